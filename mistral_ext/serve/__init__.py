"""An HTTP server with OpenAI's API; `server.run` starts it. Needs the extra [server].

An HTTP request goes through `app` (routes) to an endpoint, such as `completions`. `protocol` turns
it into requests to the engine, `generation` collects their outputs from the engine's thread, and
`responses` turns these into JSON. `service` has the state that all requests share.
"""
