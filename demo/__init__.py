"""The demos: arguments (flags), harness (loading and running), report (results and JSON), display (the terminal)."""
