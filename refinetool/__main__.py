"""Run the `refinetool` command as `python -m refinetool`."""

from refinetool.cli import main

if __name__ == "__main__":
    main()
