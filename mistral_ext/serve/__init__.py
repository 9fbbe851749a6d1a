"""An HTTP server with OpenAI's API, which `server.Server` runs. It needs the extra [server].

An HTTP request goes through `app` (routes) to an endpoint, such as `completions`. `protocol` turns
the HTTP request into requests to the engine, `generation` collects their outputs from the engine's
thread, and `responses` turns the outputs into JSON. `service` has the state that all HTTP requests
share.
"""
