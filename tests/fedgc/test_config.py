"""One configuration: who wins, what is refused and how, and that its written form repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.registry import DEFENSES
from fedgc.config import Config, known_keys, load_config, parse_setting, parse_value, read_toml, validated
from fedgc.errors import UsageError
from fedgc.pipeline.grids import cells

CONFIGS = Path(__file__).parents[2] / "configs"
KEY, VARIABLE = "federation.rounds", "FEDGC_PRIV_FEDERATION_ROUNDS"


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(*wanted: str, **given: Any) -> str:
    """The one-line message of the usage error (exit code 2) that a configuration must end in."""
    with pytest.raises(UsageError) as error:
        load_config(given.pop("file", None), **given)
    assert error.value.exit_code == 2
    message = str(error.value)
    for text in wanted:
        assert text in message
    return message


# -- precedence


def test_default_file_environment_set_flag_in_rising_order(toml) -> None:
    places = {"file": toml("federation.rounds = 2"), "environment": {VARIABLE: "3"}}
    later = {"settings": [f"{KEY}=4"], "flags": {KEY: 5}}
    assert load_config().federation.rounds == Config().federation.rounds > 5
    assert load_config(places["file"]).federation.rounds == 2
    assert load_config(**places).federation.rounds == 3
    assert load_config(**places, settings=later["settings"]).federation.rounds == 4
    assert load_config(**places, **later).federation.rounds == 5


def test_a_flag_that_was_not_given_leaves_what_stands() -> None:
    assert load_config(settings=["seed=3"], flags={"seed": None}).seed == 3


def test_the_last_set_wins_and_others_stay(toml) -> None:
    config = load_config(toml("[federation]\nrounds = 2\nclients = 7"), settings=[f"{KEY}=3", f"{KEY}=4"])
    assert (config.federation.rounds, config.federation.clients) == (4, 7)


def test_other_environment_variables_are_not_ours() -> None:
    assert load_config(environment={"HOME": "/root", "FEDGC": "1"}) == Config()


def test_every_key_has_a_variable() -> None:
    for key, text in {"seed": "3", "data.image_size": "64", "head.margin": "arcface", "record.victims": "2"}.items():
        config = load_config(environment={"FEDGC_PRIV_" + key.upper().replace(".", "_"): text})
        assert config == load_config(settings=[f"{key}={text}"]) != Config()


def test_a_defense_is_chosen_and_set_by_dotted_keys() -> None:
    config = load_config(settings=["defense.name=dp-sgd", "defense.epsilon=8"])
    assert (config.defense.name, config.defense.epsilon) == ("dp-sgd", 8.0)


# -- values


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("[1, 4]", [1, 4]), ('"a b"', "a b"), ("fedgc", "fedgc"), ("", ""),
     ("a=b", "a=b"), ("/data/faces", "/data/faces"), ("synthetic:40x12", "synthetic:40x12")],
)  # fmt: skip
def test_values_are_toml_where_they_are_toml(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert parse_setting(f"data.source={text}") == ("data.source", value)


@pytest.mark.parametrize("setting", ["federation.rounds", "=3", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    refused("write KEY=VALUE", settings=[setting])


# -- refusals


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("federation.round", "federation.rounds"), ("data.image_sise", "data.image_size"), ("sed", "seed"),
     ("federation.leraning_rate", None), ("corection.weight", "correction"), ("record.victim", "record.victims")],
)  # fmt: skip
def test_an_unknown_key_suggests_the_nearest(toml, wrong: str, near: str | None) -> None:
    expected = f"did you mean '{near}" if near else ""
    for message in (
        refused(expected, settings=[f"{wrong}=3"]),
        refused(expected, "my.toml", file=toml(f"{wrong} = 3")),
    ):
        assert "unknown key" in message
        assert wrong.split(".")[0] in message
        assert "\n" not in message


def test_an_unknown_variable_is_refused() -> None:
    refused("FEDGC_PRIV_FEDERATION_ROUND: no such key", VARIABLE, environment={"FEDGC_PRIV_FEDERATION_ROUND": "3"})


@pytest.mark.parametrize(
    "setting",
    ["federation.rounds=0", "federation.rounds=2.5", "federation.clients=-1", "federation.lr=0", "federation.lr=-1",
     "federation.momentum=1", "federation.participation=0", "federation.participation=1.5", "head.margin=sphere",
     "federation.algorithm=fedprox", "data.image_size=16", "model.embedding_size=1000000", "record.batch_sizes=[0]",
     "record.rounds=sometimes", "record.clients=0", "correction.weight=-1", "seed=-1", "device=tpu", "data.source=3",
     "federation.clip_norm=-1", "federation=3", "seed=[]", "data.held_out=0"],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(setting: str) -> None:
    message = refused(setting.split("=")[0], settings=[setting])
    assert "\n" not in message


NUMBERS = ["federation.lr", "head.scale", "correction.weight", "federation.weight_decay", "data.center_fraction"]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_nan_or_infinite(key: str, value: str) -> None:
    refused(key, settings=[f"{key}={value}"])


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_epsilon_must_be_a_positive_number(value: str) -> None:
    refused("defense.epsilon = ", settings=["defense.name=dp-sgd", f"defense.epsilon={value}"])


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "nan"])
def test_delta_must_lie_between_zero_and_one(value: str) -> None:
    refused("defense.delta = ", settings=["defense.name=dp-sgd", "defense.epsilon=1", f"defense.delta={value}"])


def test_dp_sgd_needs_a_target_or_a_noise() -> None:
    refused("needs defense.epsilon (a target) or defense.noise_multiplier", settings=["defense.name=dp-sgd"])


def test_a_defense_without_a_name_is_asked_for_one() -> None:
    refused("[defense] needs a name", "defense.name = dp-sgd", settings=["defense.epsilon=3"])


def test_an_unknown_defense_lists_those_that_exist() -> None:
    message = refused("magic", settings=["defense.name=magic"])
    assert all(name in message for name in DEFENSES)


def test_a_key_of_another_defense_is_refused() -> None:
    refused("defense 'none' has no key 'defense.epsilon'", settings=["defense.name=none", "defense.epsilon=3"])


def test_several_mistakes_name_the_first_and_count_the_rest() -> None:
    refused("federation.rounds", "(and 1 more)", settings=["federation.rounds=0", "federation.lr=-1"])


@pytest.mark.parametrize("text", ["[federation", "a = ", "= 3", "seed = 1\nseed = 2", "\0"])
def test_a_file_that_is_not_toml_is_named(toml, text: str) -> None:
    refused("my.toml cannot be read as TOML", file=toml(text))


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b'data.source = "\xff"')
    refused("my.toml cannot be read as TOML", file=path)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    refused("none.toml does not exist", file=tmp_path / "none.toml")
    refused("cannot be read", file=tmp_path)


@pytest.mark.parametrize("setting", ["seed.x=3", "federation.rounds.x=3"])
def test_a_value_is_not_a_section(setting: str) -> None:
    refused(settings=["federation.rounds=3", "seed=1", setting])


# -- the written form


def changed() -> Config:
    return load_config(
        settings=[
            "seed=9", "data.source=synthetic:40x12", "federation.algorithm=fedavg", "federation.lr=0.1",
            "head.margin=arcface", "record.rounds=[1, 5]", "record.clients=2", "record.batch_sizes=[2]",
            "defense.name=dp-sgd", "defense.epsilon=8", "defense.noise_seed=3",
        ]
    )  # fmt: skip


@pytest.mark.parametrize("config", [Config(), changed()], ids=["default", "changed"])
def test_the_written_form_repeats_the_configuration(toml, config: Config) -> None:
    again = load_config(toml(config.to_toml()))
    assert again == config
    assert again.digest() == config.digest()
    assert again.to_toml() == config.to_toml()


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-6, 10), seed=st.integers(0, 2**62), rounds=st.integers(1, 10**6),
    source=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=30),
)  # fmt: skip
def test_any_values_survive_being_written(lr: float, seed: int, rounds: int, source: str) -> None:
    import tomllib

    config = validated({"seed": seed, "data": {"source": source}, "federation": {"lr": lr, "rounds": rounds}})
    assert validated(tomllib.loads(config.to_toml())) == config


def test_no_clipping_survives_being_written(toml) -> None:
    config = validated({"federation": {"clip_norm": 0}})
    assert config.schedule().clip_norm is None
    assert load_config(toml(config.to_toml())) == config


def test_the_digest_tells_configurations_apart() -> None:
    digests = {
        load_config(settings=[s]).digest() for s in ("seed=1", "seed=2", "federation.lr=0.02", "record.victims=1")
    }
    assert len(digests) == 4
    assert load_config(settings=["seed=0"]).digest() == Config().digest()


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.federation.rounds = 3  # type: ignore[misc]


def test_the_keys_of_every_defense_are_known() -> None:
    keys = known_keys()
    assert {"seed", KEY, "defense.name", "defense.epsilon", "record.batch_sizes"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_spec_and_schedule_carry_the_settings() -> None:
    config = changed()
    spec, schedule = config.spec(), config.schedule()
    assert (spec.margin, spec.image_size, spec.scale) == ("arcface", config.data.image_size, config.head.scale)
    assert (schedule.lr, schedule.rounds, schedule.momentum) == (
        0.1,
        config.federation.rounds,
        config.federation.momentum,
    )
    assert (schedule.head_lr_factor, schedule.push) == (config.head.lr_factor, config.correction.push())
    assert (schedule.augment, schedule.server_lr) == (config.data.augment, config.federation.server_lr)


def test_every_shipped_configuration_parses() -> None:
    for path in CONFIGS.glob("*.toml"):
        if "sweep" in read_toml(path):
            assert all(cell.config().digest() for cell in cells(path)), path
            with pytest.raises(UsageError, match="fedgc-priv sweep"):
                load_config(path)
        else:
            assert load_config(path).digest(), path
