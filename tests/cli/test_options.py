"""Options are the fields of dataclasses, and their help is the documentation of these."""

import argparse
from dataclasses import fields
from typing import get_args

import pytest
import yaml

import hf_lowrank
from hf_lowrank import Calibration, ConfigError, Recipe
from hf_lowrank.cli import calibrate, evaluate, factorize, inspect, list, push, report, to_dense
from hf_lowrank.cli.options import Argument, documentation, labelled, value
from hf_lowrank.cli.recipe import recipe_from


COMMANDS = [calibrate, evaluate, factorize, inspect, list, push, report, to_dense]


def parser_of(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


def parse(*arguments):
    return recipe_from(parser_of(factorize).parse_args(["model", "out", *arguments]))


@pytest.mark.parametrize("cls", [Recipe, Calibration])
def test_every_field_is_documented_and_an_option(cls):
    documented = documentation(cls)
    options = {action.dest: action for action in parser_of(factorize)._actions}
    prefix = "recipe_" if cls is Recipe else "calibration_"
    for f in fields(cls):
        if (cls, f.name) == (Calibration, "data"):
            continue
        option, argument = options[prefix + f.name], documented[f.name]
        assert len(argument.text) > 10
        assert argument.text in option.help.replace("%%", "%")
        numbers = {int, float} & {f.type, *get_args(f.type)}
        assert option.type is (numbers.pop() if numbers else value), "as annotated"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_shown(command):
    assert "usage" in parser_of(command).format_help()


def test_documentation_is_read_as_it_stands():
    class Documented:
        """One line.

        Args:
            first (`str` or `dict`, defaults to `"a (b): c"`): what [`Method`] does,
                and more of it.
            number (`int`, *optional*): of (them): all.
            second: at 50 % of it.

        Raises:
            third: no argument.
        """

    assert documentation(Documented) == {
        "first": Argument(value, "what `Method` does, and more of it."),
        "number": Argument(int, "of (them): all."),
        "second": Argument(value, "at 50 % of it."),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("svd", "svd"),
        ('{"name": "svd"}', {"name": "svd"}),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("null", None),
        ("[qk]_proj", "[qk]_proj"),
        ("{bad", "{bad"),
        ("7", "7"),
    ],
)
def test_values(text, expected):
    assert value(text) == expected


def test_labels_of_files():
    assert labelled(["dense/eval.json", "small=small/eval.json"]) == {
        "eval": "dense/eval.json",
        "small": "small/eval.json",
    }
    with pytest.raises(
        ConfigError, match="Two files are called 'eval', dense/eval.json and small/eval.json; give LAB"
    ):
        labelled(["dense/eval.json", "small/eval.json"])
    with pytest.raises(ConfigError, match="Two files are called 'a'"):
        labelled(["a=b.json", "a=c.json"])


def test_only_what_is_given_is_in_the_recipe():
    assert parse() == {}
    typed = [
        "--rank",
        "4",
        "--energy",
        "0.5",
        "--method",
        '{"name": "kfac_svd", "grad_shrinkage": 0.3}',
        "--seed",
        "3",
    ]
    method = {"name": "kfac_svd", "grad_shrinkage": 0.3}
    assert parse(*typed) == {"rank": 4, "energy": 0.5, "method": method, "seed": 3}
    typed = ["--calibration-length", "12", "--calibration-temperature", "0.5"]
    assert parse(*typed) == {"calibration": {"length": 12, "temperature": 0.5}}
    found = parse("--calibration", '{"data": "a.txt", "length": 3, "samples": 5}', "--calibration-length", "12")
    assert found == {"calibration": {"data": "a.txt", "length": 12, "samples": 5}}


def test_a_mapping_of_calibration_options_has_known_keys():
    config_from = hf_lowrank.integrations.out_of_core.config_from
    config, _ = config_from(parse("--calibration", '{"data": "a.txt", "samples": 5}'))
    assert config.calibration == Calibration("a.txt", samples=5)
    with pytest.raises(ConfigError, match=r"Calibration has no option \['sample'\]; its options are \['data'"):
        config_from(parse("--calibration", '{"data": "a.txt", "sample": 5}'))


def test_sizes_are_numbers_of_bytes_or_text():
    for typed, expected in (("20000", 20000), ("5GB", "5GB")):
        arguments = parser_of(factorize).parse_args(["model", "out", "--max-shard-size", typed])
        assert arguments.max_shard_size == expected


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    file = {"method": "svd", "param_ratio": 0.5, "seed": 7, "calibration": {"data": "a.txt", "samples": 3}}
    path.write_text(yaml.safe_dump(file))
    assert parse("--config", str(path)) == file
    found = parse("--config", str(path), "--rank", "8", "--calibration", "b.txt", "--calibration-length", "5")
    calibration = {"data": "b.txt", "samples": 3, "length": 5}
    assert found == {"method": "svd", "seed": 7, "rank": 8, "calibration": calibration}, "one budget replaces another"
    path.write_text("calibration: a.txt")
    assert parse("--config", str(path), "--calibration-samples", "2")["calibration"] == {"data": "a.txt", "samples": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("methud: svd", r"recipe.yaml has no option \['methud'\]; its options are \['method'"),
        ("calibration: {sample: 3}", r"`calibration` of .*recipe.yaml has no option \['sample'\]"),
        ("- svd", "must be a mapping of options, not list"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read: could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, match):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        parse("--config", str(tmp_path / "recipe.yaml"))
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_an_empty_file_is_a_recipe_of_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    assert parse("--config", str(tmp_path / "recipe.yaml")) == {}
    config, run = hf_lowrank.integrations.out_of_core.config_from({})
    assert (config.method.name, run) == ("kfac_svd", {})
