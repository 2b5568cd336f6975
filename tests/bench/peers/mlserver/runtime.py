"""MLServer: a custom runtime, as its documentation shows."""

from graph import Graph
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Runtime(MLModel):
    async def load(self) -> bool:
        self.graph = Graph()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        codecs = {each.name: StringCodec if each.datatype == "BYTES" else NumpyCodec for each in payload.inputs}
        outputs = self.graph.run({each.name: codecs[each.name].decode_input(each) for each in payload.inputs})
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, array) for name, array in outputs.items()],
        )
