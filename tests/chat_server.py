"""A server for tests of the chat page."""
from contextlib import contextmanager
KEY = "open sesame".replace(" ", "-")
@contextmanager
def chat_server(folder):
    yield "http://127.0.0.1:8123/"
