"""Specs survive JSON, and refuse what no model can be."""

import json

import pytest

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

IMAGE = ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp", {"pool": 2}))
TOUCH = ModalitySpec("touch_2", EncoderSpec("skin", None, {"frames": 8}), ConnectorSpec("linear"))


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("miniworld"),
        ModelSpec("some/folder", (IMAGE, TOUCH), None, "bfloat16"),
        ModelSpec("x", (TOUCH,), LoraSpec(4, 8.0, 0.1, ["q_proj", "v_proj"])),
    ],
)
def test_json_and_back(spec: ModelSpec) -> None:
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_modality_and_back() -> None:
    assert ModalitySpec.from_dict(json.loads(json.dumps(TOUCH.to_dict()))) == TOUCH


@pytest.mark.parametrize("key", ["name", "encoder", "connector"])
def test_a_missing_key(key: str) -> None:
    values = IMAGE.to_dict()
    del values[key]
    with pytest.raises(CheckpointError, match=rf"'{key}'; name, encoder and connector are expected"):
        ModalitySpec.from_dict(values)


def test_an_unknown_key_or_no_mapping_at_all() -> None:
    values = IMAGE.to_dict()
    values["encoder"]["wieghts"] = "x"
    with pytest.raises(CheckpointError, match="wieghts"):
        ModalitySpec.from_dict(values)
    with pytest.raises(CheckpointError, match="modality image: "):
        ModalitySpec.from_dict("image")  # type: ignore[arg-type]


def test_full_tuning_is_said_never_guessed() -> None:
    values = ModelSpec("x").to_dict()
    assert ModelSpec.from_dict(values | {"lora": {}}).lora == LoraSpec()
    assert ModelSpec.from_dict(values | {"lora": None}).lora is None
    del values["lora"]
    with pytest.raises(KeyError, match="lora"):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize("name", ["", "Image", "a.b", "a/b", "x y", "text"])
def test_a_name_is_a_slot(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"modality '{name}': cannot be a slot <{name}> of a prompt; a-z, 0-9 and _"):
        ModalitySpec(name, IMAGE.encoder, IMAGE.connector)
