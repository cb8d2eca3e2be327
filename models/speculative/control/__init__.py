"""How many tokens to draft: policies, and the costs and chances that they go by."""
