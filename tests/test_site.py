"""The site: every page is in its menu, the reference is of this library, and plans are as their schema says."""

import importlib.util
import json
import re

import pytest
import yaml
from blocks import ROOT

import logsnr
from logsnr import Plan
from logsnr.cli.application import WANTED, app
from logsnr.zoo import PLANS
from logsnr.zoo import folder as zoo_folder
from logsnr.zoo import names as zoo_names

DOCS = ROOT / "docs"


def menu(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from menu([value] if isinstance(value, str) else value)


def test_every_page_is_in_the_menu():
    """A page that is not: give it a line under `nav` in mkdocs.yml, beside its kind."""
    text = re.sub(r"!\w\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(menu(yaml.safe_load(text)["nav"]))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_its_tool_writes_and_has_every_public_name():
    reference = tool("reference")
    for name, text in reference.pages().items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, "run python tools/reference.py"
    names = [name for _, names, rooms in reference.PAGES.values() for name in (*names, *rooms)]
    assert len(names) == len(set(names))
    assert set(logsnr.__all__) <= set(names)


def test_every_command_stands_where_one_looks_for_it_and_has_an_example():
    reference = tool("reference")
    main = reference.typer.main.get_command(app)
    assert {name for group in WANTED.values() for name in group} == set(main.commands)
    for words, command in reference.commands(main, "logsnr"):
        assert re.search(rf"Example: (torchrun .*)?{words} ?", command.help), words


def fits(value, schema, whole):
    """Whether a value fits a schema of the few words that ours is made of."""
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole)
    if "oneOf" in schema:
        return sum(fits(value, one, whole) for one in schema["oneOf"]) == 1
    kinds = {"object": dict, "array": list, "number": (int, float), "null": type(None)}
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    good = not types or any(isinstance(value, kinds[kind]) for kind in types)
    good &= "const" not in schema or value == schema["const"]
    good &= "enum" not in schema or value in schema["enum"]
    if isinstance(value, int | float):
        good &= value >= schema.get("minimum", value)
    if isinstance(value, list):
        good &= len(value) >= schema.get("minItems", 0) and all(fits(v, schema.get("items", {}), whole) for v in value)
    if isinstance(value, dict) and "object" in types:
        parts, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        of = {k: parts.get(k) or next((s for p, s in patterns.items() if re.search(p, k)), None) for k in value}
        good &= set(schema.get("required", ())) <= set(value) and len(value) >= schema.get("minProperties", 0)
        good &= schema.get("additionalProperties", True) or None not in of.values()
        good &= all(fits(value[key], one, whole) for key, one in of.items() if one)
    return bool(good)


@pytest.mark.parametrize("name", zoo_names())
def test_plans_of_the_zoo_fit_the_schema_of_plans(name):
    schema = json.loads((DOCS / "reference" / "plan.schema.json").read_text(encoding="utf-8"))
    plans = json.loads((zoo_folder(f"zoo:{name}") / PLANS).read_text(encoding="utf-8"))
    one = next(iter(plans.values()))
    assert all(fits(plan, schema, schema) for plan in (plans, one))
    infinite = {**one, "sigmas": ["inf", *one["sigmas"][1:]]}
    assert fits(infinite, schema, schema)
    wrong = [{**one, "basis": "score"}, {**one, "more": 1}, {**one, "version": 2}, {**one, "sigmas": [1.0]}]
    wrong += [{key: value for key, value in one.items() if key != "rows"}, {**one, "sigmas": [-1.0, 0.0]}, {"x": one}]
    assert not any(fits(plan, schema, schema) for plan in wrong)
    assert set(schema["$defs"]["plan"]["properties"]) == set(
        Plan(sigmas=(1.0, 0.0), rows=((1.0,),), keep=(2.0,)).to_dict()
    )


CLICKS = {
    "five steps for my SDXL": ("five-steps.md", "GradientEstimationScheduler.from_config("),
    "train on my photos": ("own-images.md", "logsnr train "),
    "which weighting": ("which-objective.md", "sigmoid"),
    "bits/dim of my model": ("likelihood.md", "logsnr evaluate "),
    "what is a plan": ("reference/plan.md", '"sigmas"'),
}
"""The page that answers, and what it cannot answer without."""


@pytest.mark.parametrize("question", CLICKS)
def test_a_newcomers_question_is_answered_within_two_clicks(question):
    def links(page):
        text = (DOCS / page).read_text(encoding="utf-8")
        to = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)}
        return {link for link in to if link.endswith(".md") and (DOCS / link).exists()}

    first = links("index.md")
    page, answer = CLICKS[question]
    assert page in first | {other for link in first for other in links(link)}
    assert answer in (DOCS / page).read_text(encoding="utf-8")
