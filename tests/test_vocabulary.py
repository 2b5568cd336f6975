"""A model that takes names of items, on a real Triton: names give what ids give, and a bad request is one 400."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_client import InferenceClient, InvalidInput

from deepseek.spec import DeploymentSpec, InputError
from deepseek.vocabulary import Vocabulary
from export.checks.parity import compare_served
from export.checks.parity_cases import EndpointComparison
from export.checks.parity_strings import AT_NAMES, compare_names, named_predictor
from export.model_folder import ModelFolder
from export.rows import load_rows
from export.stages.publish import publish_version
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.conftest import Refused, RunHere, serves
from tests.test_onnxruntime_backend import counter, statistics
from tests.test_openai import call
from tests.test_text import without_rows
from tests.waiting import wait_for

MODELS = Path("tests/models")
VOCABULARY = Vocabulary(MODELS / "shop" / "catalogue.csv")
NAMES = [name.decode() for name in VOCABULARY.names]
SEEN = np.zeros((1, 6), np.int64)
METRICS = [f'onnxruntime_vocabulary_{name}{{model="shop",version="1"}}' for name in ("names", "unknown_names")]
server = serves("built_shop")


def k_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)[:, None]


def ranked(seen: list[int], never: list[int]) -> list[int]:
    """Every item that may be answered, best first, from the model's weights."""
    weights = ModelFolder("shop", MODELS).load().embed.weight.detach()
    mean = torch.stack([weights[item] for item in [0] * (6 - len(seen)) + seen]).mean(dim=0)
    order = (weights @ mean).argsort(descending=True).tolist()
    return [item for item in order if item not in {0, *seen, *never}]


def test_names_give_what_their_ids_give_with_titles(client: InferenceClient) -> None:
    ids = client.infer("shop", {"seen": np.array([[0, 0, 0, 4, 6, 1]])})
    found = client.infer("shop", {"history": [[NAMES[4], NAMES[6], NAMES[1]]]})
    for name, array in ids.items():
        np.testing.assert_array_equal(found[name], array)
    best = found["best"][0].tolist()
    assert best == ranked([4, 6, 1], [])[:5]
    assert found["skus"].tolist() == [[NAMES[item].encode() for item in best]]
    assert found["titles"].tolist() == [[VOCABULARY.titles[item] for item in best]]
    assert found["unknown"].tolist() == [[0]]
    assert VOCABULARY.titles[[4, 5]].tolist() == ["列車".encode(), b"SKU-5"]  # without a title: the name
    long = [NAMES[11], NAMES[12], *NAMES[1:4], "x", *NAMES[4:7]] + ["x"] * 20  # the latest six known ones count
    found, last = (client.infer("shop", {"history": [names]}) for names in (long, NAMES[1:7]))
    np.testing.assert_array_equal(found["best"], last["best"])


def test_excluded_items_are_replaced_by_the_next_best(client: InferenceClient) -> None:
    """The items are masked before the best are chosen, so there are always k while enough remain."""
    never = ranked([4, 6], [])[:4]
    for k in (1, 5):
        inputs: Any = {"history": [[NAMES[4], NAMES[6]]], "exclude": [[NAMES[item] for item in never]], "k": k_of(k)}
        found = client.infer("shop", inputs)
        assert found["best"].tolist() == [ranked([4, 6], never)[:k]]
        assert found["skus"].shape == found["titles"].shape == found["scores"].shape == (1, k)
        assert found["mood"].shape == (1, 1)  # an output that has no items is not cut
    ids = np.array([[*never[:2], 0, 0]], np.int32)  # names and ids may be mixed
    found = client.infer("shop", {"history": [[NAMES[4], NAMES[6]]], "not_these": ids})
    assert found["best"].tolist() == [ranked([4, 6], never[:2])[:5]]
    found = client.infer("shop", {"history": [NAMES[1:7]], "exclude": [NAMES[7:11]]})
    assert sorted(found["skus"][0].tolist()) == [b"", b"", b"", b"SKU-11", b"SKU-12"]
    assert found["titles"][0, -3:].tolist() == [b"", b"", b""]


def test_unknown_names_are_ignored_and_counted_by_row(server: EmbeddedServer, client: InferenceClient) -> None:
    before = [counter(server, name) for name in METRICS]
    rows: Any = [["SKU-1", "x", "SKU-2"], ["y", b"\xff\xfe", ""], ["SKU-1", "", "SKU-2"]]
    found = client.infer("shop", {"history": rows, "exclude": [["z"], ["SKU-3"], [""]]})
    assert found["unknown"].tolist() == [[2], [2], [0]]
    np.testing.assert_array_equal(found["skus"][0], found["skus"][2])
    wait_for(lambda: [counter(server, name) - old for name, old in zip(METRICS, before, strict=True)] == [9, 4])


def test_a_history_without_known_items_is_one_of_padding(client: InferenceClient) -> None:
    nothing = client.infer("shop", {"seen": SEEN})
    for history in (["nothing", "known"], [""], []):
        found = client.infer("shop", {"history": np.array([history], object)})
        np.testing.assert_array_equal(found["best"], nothing["best"])


@pytest.mark.parametrize("history", [[], ["x" * 252] * 256])  # the latter fill the region, 64 KiB
def test_empty_lists_go_through_shared_memory(server: EmbeddedServer, history: list[str]) -> None:
    with InferenceClient(server.grpc_url, shared_memory=True) as client:
        found = client.infer("shop", {"history": [history], "exclude": [[]]})
        assert client.statistics().models["shop"].through_shared_memory == 1
    assert found["unknown"].tolist() == [[len(history)]]


def test_lists_of_any_length_run_as_one_batch_in_which_a_bad_one_fails_alone(server: EmbeddedServer) -> None:
    before = statistics(server, "shop")

    def seen(number: int) -> list[int]:
        return [(number + step) % 12 + 1 for step in range(number % 6 + 1)]

    def ask(caller: InferenceClient, number: int) -> list[int]:
        inputs: Any = {"history": [[NAMES[item] for item in seen(number)]], "k": k_of(number % 6)}
        try:
            return caller.infer("shop", inputs)["best"][0].tolist()
        except InvalidInput:  # if k is 0
            return []

    with InferenceClient(server.grpc_url, timeout_s=60) as caller, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(caller, number), range(180)))
    after = statistics(server, "shop")
    assert answers == [ranked(seen(number), [])[: number % 6] for number in range(180)]
    requests, batches = (after[name] - before[name] for name in ("inference_count", "execution_count"))
    assert requests >= 150
    assert batches < requests
    labels = '{model="shop",reason="INTERNAL",version="1"}'
    assert counter(server, f"onnxruntime_inference_request_failure{labels}") == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"history": [["a"]], "k": k_of(6)}, "k is 6; allowed: 1 to 5"),
        ({"history": [["a"], ["b"]], "k": k_of(1, 3)}, "k is 1 in one row and 3 in another; send one number for all"),
        ({"history": [["a"]], "seen": SEEN}, "seen history with seen; send one of them"),
        ({"k": k_of(1)}, "input history is missing; send it, or ids as seen"),
        ({}, "shop: no input; it takes seen (INT64"),
        (
            {"history": ["a"]},
            "the model takes 2: [-1, -1] with the batch first; for a batch of one: [inputs['history']]",
        ),
        ({"history": [["a"] * 257]}, "history has 257 names in a row; allowed: up to 256"),
        ({"history": [["a"]], "exclude": [NAMES[1:6]]}, "exclude has 5 known items in a row; allowed: up to 4"),
        ({"history": [["a"]] * 9}, "a batch of 9; at most 8 are allowed"),
    ],
)
def test_a_bad_request_is_one_line(client: InferenceClient, inputs: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        client.infer("shop", inputs)


def test_a_batch_without_rows_is_refused(server: EmbeddedServer) -> None:
    for inputs in ({"history": b"\1\0\0\0a"}, {"seen": bytes(48)}):
        assert without_rows(server, "shop", inputs) == "the batch has no rows; send one at least"


def test_the_classes_of_names_are_refused(server: EmbeddedServer) -> None:
    """Triton itself would divide by 0 and end."""
    inputs = [{"name": "history", "datatype": "BYTES", "shape": [1, 1], "data": ["SKU-1"]}]
    for output, status in (("skus", 400), ("best", 200)):
        outputs = [{"name": output, "parameters": {"classification": 2}}]
        body = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        found, _, answer = call(server.http_url, "POST", "/v2/models/shop/infer", body)
        assert found == status, answer


def test_infer_sends_names_from_the_command_line(server: EmbeddedServer, run_here: RunHere, refused: Refused) -> None:
    place = ("infer", "--models", str(MODELS), "--url", server.grpc_url, "--model", "shop")
    names = ("--history", f"{NAMES[4]}, {NAMES[6]},unheard", "--exclude", NAMES[ranked([4, 6], [])[0]], "--k", "2")
    run = run_here(*place, *names, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["outputs"]
    assert (found["skus"], found["unknown"]) == ([[NAMES[item] for item in ranked([4, 6], [])[1:3]]], [[1]])
    empty = run_here(*place, "--history", "", "--k", "2", "--json")  # a new user
    assert json.loads(empty.stdout)["outputs"]["skus"] == [[NAMES[item] for item in ranked([], [])[:2]]]
    comma = run_here(*place, "--history", f'"red, 9""",{NAMES[4]}, "b,c"', "--json")
    assert json.loads(comma.stdout)["outputs"]["unknown"] == [[2]]
    for flags, message in (
        (("--history", 'a,"b'), "--history: seen 'a,\"b': unexpected end of data; quote a name with a comma as in csv"),
        (("--k", "2"), "--k: seen without --history; "),
        (("--history", "a", "--text", "b"), "--text and --history: seen both; "),
        (("--history", "a", "--k", "6"), "k is 6; allowed: 1 to 5"),
        (("--history", "a", "--model", "text"), "--history: deploy.toml of text has no [vocabulary]"),
    ):
        assert message in refused(*place, *flags)


def test_infer_sends_its_row_by_name_if_the_served_version_has_other_ids(
    server: EmbeddedServer, built_shop: Path, tmp_path: Path, run_here: RunHere
) -> None:
    """As after a retrain that was refused: the build has the new ids, and the server the old ones."""
    shutil.copytree(MODELS / "shop", tmp_path / "shop")
    lines = [f"{number},{name}\n" for number, name in enumerate(reversed(NAMES[1:]), start=1)]  # 12 is 1, 11 is 2 ...
    (tmp_path / "shop" / "catalogue.csv").write_text("id,item\n" + "".join(lines))
    place = ("--models", str(tmp_path), "--repository", str(built_shop / "repository"), "--url", server.grpc_url)
    run = run_here("infer", *place, "--model", "shop", "--json", DEEPSEEK_BUILD=str(built_shop / "build"))
    assert run.returncode == 0, run.stderr
    row = load_rows(built_shop / "build" / "shop" / "evaluation.npz")[0]
    seen, never = ([13 - item for item in row[name][0].tolist() if item] for name in ("seen", "not_these"))
    assert json.loads(run.stdout)["outputs"]["best"] == [ranked(seen, never)[:5]]
    assert run.stderr.startswith("note: the served version has other ids than this build")
    lines = [f"{number},{name},new title\r\n" for number, name in enumerate(NAMES[1:], start=1)]
    (tmp_path / "shop" / "catalogue.csv").write_text("id,item,title\r\n" + "".join(lines), newline="")
    run = run_here("infer", *place, "--model", "shop", "--json", DEEPSEEK_BUILD=str(built_shop / "build"))
    assert (run.returncode, run.stderr) == (0, "")  # other line ends and titles, but the same ids


def test_infer_sends_a_file_of_names_without_a_build(
    server: EmbeddedServer, built_shop: Path, tmp_path: Path, run_here: RunHere
) -> None:
    """As after a restore of what serving needs."""
    shutil.copytree(MODELS / "shop", tmp_path / "shop")
    (tmp_path / "shop" / "catalogue.csv").unlink()
    (tmp_path / "request.json").write_text(json.dumps({"history": [[NAMES[4]]]}))
    place = ("--models", str(tmp_path), "--repository", str(built_shop / "repository"), "--url", server.grpc_url)
    what = ("--model", "shop", "--inputs", str(tmp_path / "request.json"))
    run = run_here("infer", *place, *what, DEEPSEEK_BUILD=str(tmp_path / "build"))
    assert run.returncode == 0, run.stderr


def test_a_load_test_can_send_the_names_of_its_items(
    server: EmbeddedServer, built_shop: Path, run_here: RunHere, refused: Refused
) -> None:
    before = [counter(server, name) for name in METRICS]
    what = ("--models", str(MODELS), "--url", server.grpc_url, "--names", "--json", "--warmup-s", "0")
    load = ("--rate", "40", "--duration-s", "1", "--arrivals", "constant")
    here = {"DEEPSEEK_BUILD": str(built_shop / "build")}
    run = run_here("loadtest", "--model", "shop", *what, *load, **here)
    assert run.returncode in (0, 3), run.stderr  # 3: the machine was too busy to send in time
    found = json.loads(run.stdout)
    assert (found["answered"], found["errors"]) == (40, {})
    assert list(found["lengths"]) == ["items 3"]  # without padding
    names, unknown = (counter(server, name) - old for name, old in zip(METRICS, before, strict=True))
    assert (names, unknown) == (41 * 5, 0)  # with two excluded each, and the check before the load
    refused("loadtest", "--model", "text", *what, *load, **here)


def test_parity_compares_names_with_their_ids(
    server: EmbeddedServer, built_shop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built_shop / "build"))
    source = ModelFolder("shop", MODELS)
    result = compare_served(source, server.grpc_url, server.http_url, most_rows=4)
    assert result["failures"] == []
    assert len([check for check in result["checks"] if check["at"] == AT_NAMES]) == 6  # three outputs, two protocols

    shutil.copytree(MODELS / "shop", tmp_path / "shop")
    file = tmp_path / "shop" / "catalogue.csv"
    file.write_text(file.read_text().replace("SKU-1,", "SKU-x,").replace("SKU-2,", "SKU-1,").replace("SKU-x", "SKU-2"))
    with InferenceClient(server.grpc_url) as client:
        other = DeploymentSpec.of_model("shop", tmp_path)
        judge = EndpointComparison(other, "grpc", lambda inputs: client.infer("shop", inputs))
        compare_names(other, [judge], load_rows(built_shop / "build" / "shop" / "evaluation.npz"))
    assert not all(check.holds for check in judge.checks)


def test_another_version_that_numbers_its_items_otherwise_is_compared_by_name(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    shutil.copytree(MODELS / "shop", tmp_path / "shop")
    names = [*reversed(NAMES[1:]), "new"]  # 12 is 1, 11 is 2 ..., and the served version does not know 13
    lines = "".join(f"{number},{name}\n" for number, name in enumerate(names, start=1))
    (tmp_path / "shop" / "catalogue.csv").write_text("id,item\n" + lines)
    seen, excluded = np.array([[0, 0, 0, 13, 4, 6]]), np.array([[0, 0, 7, 2]], np.int32)
    spec = DeploymentSpec.of_model("shop", tmp_path)
    with InferenceClient(server.grpc_url) as client:
        predict = named_predictor(spec, lambda inputs: client.infer("shop", inputs))
        found = predict({"seen": seen, "not_these": excluded})["best"]
    assert found.tolist() == [[13 - item for item in ranked([13 - 4, 13 - 6], [13 - 7, 13 - 2])[:5]]]


def test_the_doctor_and_the_gateway_know_names(built_shop: Path, tmp_path: Path) -> None:
    here = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
    assert [str(each) for each in examine(built_shop / "repository", here)[1] if each.level == "mismatch"] == []
    (model,) = served_models(built_shop / "repository", MODELS)
    assert model.input_bytes == 8 * 2 * 256 * (len("größe-6".encode()) + 4)
    assert f"# shop: {model.input_bytes} bytes of tensors + 65536 bytes" in limits([model])
    copied = Path(shutil.copytree(built_shop / "repository", tmp_path / "repository"))
    (copied / "shop" / "1" / "catalogue.csv").write_text("id,item\n1,a\n")
    (finding, *_) = examine(copied, here)[1]
    assert "catalogue.csv" in str(finding)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: column id is missing; columns id,item,title are needed"),
        ("id,item\n1,a\n3,b\n", "line 3: id is '3'; ids are 1, 2, 3 and so on: 2 is needed"),
        ("id,item\n1,a\n2,a\n", "line 3: item is 'a', which is there twice"),
        ("id,item\n1,\n", "line 2: item is '', which is no name"),
        ('id,item\n1,"a\n', "unexpected end of data"),
        ("id,item\n1,a\n", "1 items, but no weight of the graph has a dimension of 2"),
        (None, "vocabulary.file: no file"),
    ],
)
def test_a_catalogue_that_does_not_fit_is_one_line_before_anything_is_published(
    built_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built_shop / "build"))
    shutil.copytree(MODELS / "shop", tmp_path / "shop")
    file = tmp_path / "shop" / "catalogue.csv"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError) as caught:
        publish_version(DeploymentSpec.of_model("shop", tmp_path), "fp32", "onnxruntime", tmp_path / "repository")
    said = str(caught.value)
    assert (message in said, str(file) in said) == (True, True), said
    assert not (tmp_path / "repository" / "shop").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('history = "seen"', 'history = "none"', "vocabulary.history: seen 'none'; inputs are not_these, seen"),
        ('items = "best"', 'items = "other"', "vocabulary.items: seen 'other'; outputs are best, mood, scores"),
        ('items = "best"', 'items = "scores"', "scores is float32 ['batch', 5]; allowed: int32 or int64, [\"batch\", "),
        ('exclude = "not_these"\n', "", "it fills seen; remove [vocabulary], or the input not_these"),
        ("outputs.mood", "outputs.titles", "[vocabulary] adds a tensor titles; rename the model's own"),
        ("[axes.batch]\nmin = 1", "[axes.batch]\nmin = 2", "axes.batch.min is 2; with [vocabulary], it must be 1"),
        ("[precision]", '[text]\ninput_ids = "seen"\n[precision]', "text"),
        ("[vocabulary]", '[vocabulary]\nfile = "../x.csv"', "vocabulary.file: seen '../x.csv'; allowed: a path inside"),
    ],
)
def test_a_model_that_cannot_take_names_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    good = (MODELS / "shop" / "deploy.toml").read_text()
    assert old in good
    (tmp_path / "deploy.toml").write_text(good.replace(old, new))
    with pytest.raises(InputError, match=re.escape(message)):
        DeploymentSpec.load(tmp_path)
