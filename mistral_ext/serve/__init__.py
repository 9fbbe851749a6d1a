"""An HTTP server with OpenAI's API; `server.run` starts it. Needs the extra [server].

An HTTP request goes through `app` (routes) to an endpoint (`completions`, `tokens`). `protocol`
makes requests to the engine of it, `generation` takes what the engine's thread gives for them, and
`responses` makes JSON of that. `service` has what all requests share.
"""
