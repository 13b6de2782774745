"""`python -m refinetool` is `refinetool`."""

from refinetool.cli import main

if __name__ == "__main__":
    main()
