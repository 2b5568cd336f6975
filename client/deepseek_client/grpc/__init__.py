"""KServe v2 over gRPC: the transport, grpcio's channels, request encoding, status codes.

Enter: `transport.GrpcTransport`, made by `deepseek_client.client`. Imports: modules of `deepseek_client` that both
protocols share, never `http/` or `cli/`.
"""
