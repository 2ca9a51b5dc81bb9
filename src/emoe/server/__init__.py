"""HTTP: OpenAI's API, latency targets, limits, metrics.

    app = create_app(engine, ServerSettings(), tokenizer, "emoe-nano")      app.py
    serve(app, listen("127.0.0.1", 8000))                                   running.py

A request's path: schemas.py says what it may be, chat.py and completions.py make submissions of it, bridge.py gives
them to the engine and brings its events to the event loop, streaming.py makes text of tokens, answering.py an answer.
Needs `pip install 'emoe[serve]'`.
"""
