import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from groupwise.engine.config import CONFIGS, SECTIONS, Config, ModelConfig, RopeScaling, describe_settings, load_config
from groupwise.engine.errors import UserError

SETTINGS = [(name, f) for name, cls in SECTIONS.items() for f in dataclasses.fields(cls) if "help" in f.metadata]


def test_defaults_file_and_overrides_are_applied_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[grpo]\nsteps = 7\nlr = 1\n[run]\nname = 'x'\n")
    config = load_config(file, ["grpo.steps=9", "run.folder=out", "tables=/data/my tables"])
    assert (config.grpo.steps, config.grpo.lr, config.run.name) == (9, 1.0, "x")
    assert isinstance(config.grpo.lr, float)
    assert (config.run.folder, config.data.tables) == ("out", "/data/my tables")
    assert config.sft == Config().sft


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().grpo.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_file_loads_by_its_name(file: Path) -> None:
    config = load_config(file.stem)
    for section, values in tomllib.loads(file.read_text()).items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("grpo.stps=3", "unknown configuration key 'grpo.stps'; did you mean 'grpo.steps'?"),
        ("tabels=x", "did you mean 'tables'?"),
        ("grpo.steps=many", 'grpo.steps is "many", expected a whole number'),
        ("grpo.steps=1.5", "grpo.steps is 1.5, expected a whole number"),
        ("grpo.steps=true", "grpo.steps is true, expected a whole number"),
        ("grpo.steps=0", "grpo.steps is 0, expected at least 1"),
        ("evaluate.top_p=1.5", "evaluate.top_p is 1.5, expected from 0 to 1"),
        ("grpo.lr=nan", "grpo.lr is NaN, expected a finite number"),
        ("optimizer.reshard_after_forward=1", "expected true or false"),
        ("reward.kind=best", "reward.kind is 'best', expected one of 'datarus', 'datamind'"),
        ("lr=3", "'lr' is a key of several sections; write one of grpo.lr, hrm.lr, sft.lr"),
        ("grpo.steps", "is no override; write section.key=value"),
        ("model.num_key_value_heads=3", "does not divide"),
        ("model.hidden_size=130", "is no multiple of"),
        ("model.model_type=gpt2", "model.model_type is 'gpt2', expected one of 'qwen2', 'qwen3', 'llama'"),
        ("model.rms_norm_eps=1e-5", "unknown configuration key 'model.rms_norm_eps'"),
        ("data.strata=40/35/15/20", "data.strata is '40/35/15/20', expected 4 percentages of success/corrected"),
        ("data.modes=50/50", "data.modes is '50/50', expected 3 percentages of datamind/agentic/reflection"),
        ("grpo.num_minibatches=17", "expected at most grpo.prompts_per_step, 16"),
        ("grpo.dual_clip=1.28", "grpo.dual_clip is 1.28, expected 0 or more than 1 + grpo.epsilon_high, 1.28"),
        ("grpo.loss_type=nope", "expected one of 'dapo', 'grpo', 'dr_grpo', 'gspo', 'cispo'"),
        ("grpo.importance_correction=clip", "expected one of 'none', 'truncated', 'mask'"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[grop]\nsteps = 1\n", "unknown section [grop]; did you mean 'grpo'?"),
        ("[grpo]\nbta = 1\n", "unknown configuration key 'grpo.bta'; did you mean 'beta'?"),
        ("grpo = 3\n", "expected a section"),
        ("[grpo\n", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert sentence in str(error.value)


def test_an_absent_file_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="train"):
        load_config("trian")


def test_every_setting_is_described_and_there_are_fewer_than_100() -> None:
    assert len(SETTINGS) < 100
    text = describe_settings()
    for section, f in SETTINGS:
        assert f.metadata["help"]
        assert f"{section}.{f.name}=" in text


def test_a_model_of_a_folder_survives_json() -> None:
    model = ModelConfig(model_type="llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    config = dataclasses.replace(Config(), model=model)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert "rope_scaling" not in describe_settings()


def test_every_setting_is_read_somewhere() -> None:
    root = CONFIGS.parent
    folders = ("engine", "rollout", "rewards", "data", "recipes")
    files = [path for folder in folders for path in (root / folder).rglob("*.py") if path.name != "config.py"]
    source = "\n".join(path.read_text() for path in files)
    unread = [
        f"{section}.{f.name}" for section, f in SETTINGS if f".{f.name}" not in source and f"{f.name!r}" not in source
    ]
    assert [key for key in unread if key not in ("model.head_dim",)] == []
