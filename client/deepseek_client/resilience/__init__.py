"""What a client does when a server fails: round-robin over replicas, ejection, retries within a budget, hedges.

Enter: `retry`, which `deepseek_client.core` uses. Imports: modules of `deepseek_client` at the top.
"""
