"""What runs on a board as one program."""
