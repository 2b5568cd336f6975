"""TorchServe: a custom handler, which gets a batch of requests."""

from graph import Graph
from ts.torch_handler.base_handler import BaseHandler


class Handler(BaseHandler):
    def initialize(self, context):
        self.graph = Graph()
        self.initialized = True

    def handle(self, data, context):
        return self.graph.answers([request["body"] for request in data])
