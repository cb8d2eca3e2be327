"""An OpenAI-compatible HTTP server on the engine: `python -m models.server --help`.

    settings.py        what a user may choose, and the command line
    app.py             the application: middleware, error handlers, the chat page
    routes.py          /v1/models, /v1/chat/completions, /v1/completions
    text_routes.py     /tokenize, /detokenize, /health, /metrics
    schemas.py         bodies of requests
    planning.py        from a body to a `Job`
    jobs.py            a request under way: its choices, and the events that its handler waits for
    engine_thread.py   the one thread that loads the models and takes the engine's steps
    mailbox.py         what it hands to the event loop
    texts.py           a choice while it is written
    audits.py          replays finished texts against plain decoding
    drafting.py        who drafts for a request
    scores.py          log-probabilities
    answers.py         the shapes of responses; stream.py: server-sent events
    metrics.py         Prometheus
    connections.py     connections whose clients do nothing
    guard.py           body size, slow bodies, API key
    errors.py          errors in OpenAI's form
    running.py         the process: socket, signals, draining
    page/              the chat page, static files

Two threads: uvicorn's event loop reads and answers requests and does what concerns texts alone; the engine's thread
does everything that touches a model. They talk by a queue in one direction and `call_soon_threadsafe` in the other.

Needs the packages of the extra `server`.
"""
