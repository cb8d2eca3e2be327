"""A model's weights on a board: formats, layout, disk cache, memory."""
