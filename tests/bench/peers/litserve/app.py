"""LitServe with dynamic batching and a worker for each core."""

import sys

import litserve
from graph import CORES, DELAY_S, MAX_BATCH, Graph


class Api(litserve.LitAPI):
    def setup(self, device):
        self.graph = Graph()

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        return self.graph.answers(inputs)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=DELAY_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=CORES)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
