"""Reading and editing other people's models."""
