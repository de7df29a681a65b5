"""The card of a factorized model: everything in it is read off the model, its recipe, or a measurement."""

import json
import re
from dataclasses import MISSING, fields
from itertools import groupby

from ..errors import ConfigError
from ..methods import METHODS
from ..readme import TAGS, inherited, rendered
from ..recipe import BUDGETS, Recipe
from ..reporting import summary
from ..surgery import factorized
from .calibration import SELF, Calibration
from .measured import as_json, check_measured, quality


def model_card(model=None, repo_id=None, evaluation=None, dense=None, command=None, token=None, **metadata):
    """Describe a factorized model, or an adapter of one, for the Hub.

    `model.push_to_hub(repo_id)` writes this card by itself. Make it yourself to put measured quality into it, or words
    of your own, and push it with the weights: `model.push_to_hub(repo_id, model_card=card)`.

    Args:
        model (`PreTrainedModel` or `PeftModel`, *optional*): factorized, or with adapters that need this package.
            Without it, everything is read off `evaluation`, which knows class, recipe and size, but no ranks.
        repo_id (`str`, *optional*): where the model will be found.
        evaluation ([`Evaluation`], `dict` or `str`, *optional*): what `hf_lowrank.evaluate` returned for the model, or
            the file it was saved to.
        dense ([`Evaluation`], `dict` or `str`, *optional*): the same of the base model.
        command (`str`, *optional*): that made the model.
        token (`str` or `bool`, *optional*): to read the base model's card with, as in `huggingface_hub`.
        metadata: entries of the YAML block, in place of those that are found: `license`, `language`, `base_model` (a
            repository on the Hub), ... Licence and language are those of the base model's card, where it can be read.

    Returns:
        `huggingface_hub.ModelCard`: change its `text` and `data` at will. What stands between the two comments
        `hf_lowrank` is written anew by later pushes.

    Raises:
        ConfigError: neither a factorized model nor an evaluation of one; an evaluation that lacks something, or is of
            another model; or two that do not compare.
    """
    evaluation, dense = as_json(evaluation), as_json(dense)
    for argument, given in (("evaluation", evaluation), ("dense", dense)):
        if given is not None:
            check_measured(argument, given)
    if has_adapters(model):
        from .peft_lora.card import adapter_card

        return adapter_card(model, repo_id, evaluation, dense, token, metadata)
    described = _of_evaluation(evaluation, dense) if model is None else _of_model(model)
    if not described["recipe"] and not described["layers"]:
        raise ConfigError("There is nothing to describe: the model is not factorized.")
    if evaluation is not None and evaluation["size"]["parameters"] != described["parameters"]:
        raise ConfigError(
            f"`evaluation` is of a model with {evaluation['size']['parameters']} parameters, and this one has "
            f"{described['parameters']}; measure the model that the card is for."
        )
    recipe = described["recipe"]
    base = metadata.get("base_model", recipe.get("base_model"))
    source = base or getattr(model, "name_or_path", None)
    data = {
        "library_name": "transformers",
        "pipeline_tag": task_of(described["model_class"]),
        "tags": list(TAGS),
        "base_model": base,
        "base_model_relation": base and "quantized",
        **({} if "license" in metadata else inherited(source, token)),
        **metadata,
    }
    name = (repo_id or described["model_class"]).rpartition("/")[2]
    return rendered(
        "model",
        data,
        **{**described, "recipe": _as_code(recipe)},
        title=name,
        repo_id=repo_id or "THIS REPOSITORY",
        subject=f"[{base}](https://huggingface.co/{base})" if base else f"A `{described['model_class']}`",
        quality=quality(evaluation, dense),
        facts={
            **_facts(recipe),
            **_packing(described["inner"]),
            **({} if command is None else {"command": f"`{command}`"}),
        },
        versions=recipe.get("versions") or (evaluation or {}).get("environment"),
    )


def has_adapters(model):
    """Whether saving `model` saves adapters, and not the model that they are on."""
    return getattr(model, "_hf_peft_config_loaded", False) or hasattr(type(model), "active_peft_config")


def task_of(model_class):
    """What the Hub calls the task of a class of transformers, by its name; `None` if it has no word for it."""
    # With it come Trainer's arguments, and PEFT.
    from transformers.modelcard import TASK_MAPPING

    return next((task for task, classes in TASK_MAPPING.items() if model_class in classes.values()), None)


def _of_model(model):
    found, config = summary(model), getattr(getattr(model, "config", None), "quantization_config", None)
    return {
        "model_class": type(model).__name__,
        "recipe": getattr(config, "recipe", None) or {},
        "inner": config.to_dict().get("inner") if hasattr(config, "to_dict") else None,
        "layers": f"{len(found.rows)} linear layers are" if factorized(model) else "",
        "ranks": _rank_table(found.rows),
        **{name: getattr(found, name) for name in ("parameters", "bytes", "dense_parameters", "dense_bytes")},
    }


def _of_evaluation(evaluation, dense):
    if evaluation is None:
        raise ConfigError("Give `model`, or an `evaluation` of it; there is nothing to describe without either.")
    sizes = {name: evaluation["size"][name] for name in ("parameters", "bytes")}
    before = {} if dense is None else {f"dense_{name}": dense["size"][name] for name in sizes}
    return {
        "model_class": evaluation["model"]["class"],
        "recipe": evaluation["model"].get("quantization", {}).get("recipe", {}),
        "inner": evaluation["model"].get("quantization", {}).get("inner"),
        "layers": "linear layers are",
        "ranks": "",
        **sizes,
        **before,
    }


def _facts(recipe):
    """`{what: how}` in words."""
    if not recipe:
        return {"recipe": "not recorded"}
    facts = {}
    if "method" in recipe:
        method = _name(recipe["method"])
        # A checkpoint outlives the method it was made by.
        about = f". {METHODS[method].__doc__.strip().splitlines()[0]}" if method in METHODS else ""
        facts["method"] = f"`{method}`{about}"
        facts["budget"] = ", ".join(f"`{name}` = {recipe[name]}" for name in BUDGETS if name in recipe)
    if "channel_pruning" in recipe:
        pruned = recipe["channel_pruning"]
        facts["channels pruned"] = (
            f"in {pruned['groups']} feed-forward layers, `param_ratio` = {pruned['param_ratio']}, `keep_bottom` = "
            f"{pruned['keep_bottom']}, on {_calibration_in_words(pruned['calibration'])}"
        )
    if "allocation" in recipe:
        facts["ranks chosen by"] = f"`{_name(recipe['allocation'])}`"
    if "refine" in recipe:
        facts["refined by"] = f"`{_name(recipe['refine'])}`"
    if "method" in recipe:
        facts["calibration"] = _calibration_in_words(recipe.get("calibration"))
    if "versions" in recipe:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    return facts


def _packing(inner):
    """What an inner quantizer has made of the factors, in words."""
    if inner is None:
        return {}
    kind = inner.get("quant_type", {}).get("default", {}).get("_type")
    return {"factors quantized by": f"`{inner['quant_method']}`{f', `{kind}`' if kind else ''}"}


def _calibration_in_words(data):
    if not data:
        return "none"
    name = "text sampled from the model itself" if data["data"] == SELF else f"`{data['data']}`"
    if "sampled" in data:
        name += f" and, {data['sampled']:g} of the sequences, text sampled from the model itself"
    rest = {"tokens": "{} tokens", "seed": "seed {}", "sha256": "sha256 `{}`"}
    return ", ".join([name, *(words.format(data[key]) for key, words in rest.items() if key in data)])


def _as_code(recipe):
    """`LowRankConfig(...)` that factorizes the same way again; empty without a recipe."""
    if "method" not in recipe:
        return ""
    given = {
        f.name: _literal(recipe[f.name])
        for f in fields(Recipe)
        if f.name in recipe and f.name != "calibration" and (f.name == "method" or recipe[f.name] != f.default)
    }
    data = recipe.get("calibration") or {"data": None}
    sizes = [
        f"{f.name}={_literal(data[f.name])}"
        for f in fields(Calibration)
        if f.name in data and f.default is not MISSING and data[f.name] != f.default
    ]
    if data["data"] == "batches" or str(data["data"]).endswith(" texts"):
        given["calibration"] = "..."
    elif sizes:
        given["calibration"] = f"Calibration({', '.join(sizes)})".replace("data=", "", 1)
    return "LowRankConfig(\n" + "".join(f"    {name}={value},\n" for name, value in given.items()) + ")"


def _literal(value):
    """JSON-like `value` as Python, quoted as formatters quote."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _rank_table(rows):
    """Lines of Markdown: ranks and sizes of the layers of one type, which share a name but for numbers in it."""
    lines = [["layers", "format", "count", "rank", "kept", "error"], ["---", "---", *["--:"] * 4]]
    for (name, stored_as), found in groupby(sorted(rows, key=_type), _type):
        found = list(found)
        ranks = sorted(row.rank for row in found)
        errors = [row.relative_error for row in found if row.relative_error is not None]
        kept = sum(row.parameters for row in found) / sum(row.dense_parameters for row in found)
        spread = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        error = f"{sum(errors) / len(errors):.3f}" if errors else ""
        lines.append([f"`{name}`", f"`{stored_as}`", str(len(found)), spread, f"{kept:.1%}", error])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _type(row):
    return re.sub(r"\.\d+(?=\.)", "", row.name), row.format


def _name(described):
    return described["name"] if isinstance(described, dict) else described
