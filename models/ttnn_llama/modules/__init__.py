"""The parts of a forward, one file each."""
