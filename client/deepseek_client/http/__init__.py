"""KServe v2 over HTTP/1.1: the transport, its connection pool, the response parser.

Enter: `transport.HttpTransport`, made by `deepseek_client.client`. Imports: modules of `deepseek_client` that both
protocols share, never `grpc/` or `cli/`.
"""
