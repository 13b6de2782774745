"""Training of what the tool ships or lets users adapt."""
