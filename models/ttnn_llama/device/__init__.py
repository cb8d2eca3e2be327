"""The chips of a board: opened as meshes, joined by collectives, running programs."""
