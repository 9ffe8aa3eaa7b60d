"""Settings of recipes: layers, types, and errors that say what there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bitlm.scheme import Quantizer, SchemeError
from bitlm.train import recipe as recipes
from bitlm.train.recipe import COMMON, RecipeError, plain
from bitlm.train.schemes import EMBEDDINGS, WEIGHTS, request
from bitlm.train.stages import check

TOML = """
task = "one"
lr = 0.1
names = ["a"]
[teacher]
lr = 0.5
[by_task.two]
lr = 0.2
[by_scheme."w1a1"]
epochs = 7
[profiles.paper]
[profiles.small]
batch = 4
epochs = 2
[profiles.small.by_task]
two = {batch = 8, teacher = {lr = 0.7}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "mine.py"
    made.write_text("def run(settings, say=None):\n    return {'task': settings.at().task}\n")
    made.with_suffix(".toml").write_text(TOML)
    return made


def test_layers_from_the_weakest_to_the_strongest(path, tmp_path):
    user = tmp_path / "user.toml"
    user.write_text('recipe = "mine.py"\nprofile = "small"\nbatch = 5\n')
    assert recipes.settings(path).profile == "paper"
    values = recipes.settings(path).at()
    assert (values.task, values.lr, values.batch) == ("one", 0.1, COMMON["batch"])
    assert recipes.settings(path, ["profile=small"]).at().batch == 4
    assert recipes.settings(path, file=user).at().batch == 5
    values = recipes.settings(path, ["batch=6", "teacher.lr=1"], user).at()
    assert values.batch == 6 and values.epochs == 2.0
    assert values.teacher.lr == 1.0 and isinstance(values.teacher.lr, float)
    assert values.teacher.batch == COMMON["teacher"]["batch"]


def test_what_holds_for_one_value_of_a_setting(path):
    assert recipes.settings(path, ["task=two"]).at().lr == 0.2
    small = recipes.settings(path, ["task=two", "profile=small"]).at()
    assert (small.lr, small.batch, small.teacher.lr) == (0.2, 8, 0.7)
    assert recipes.settings(path, ["task=two", "lr=0.3", "profile=small"]).at().lr == 0.3
    chain = recipes.settings(path, ["scheme=w1a8,w1a1"])
    assert [chain.at(scheme=name).epochs for name in ("w1a8", "w1a1")] == [1.0, 7.0]
    assert chain.at().scheme == "w1a8,w1a1" and chain.at(scheme="w1a1").scheme == "w1a1"


@pytest.mark.parametrize("pair, value", [
    ("names=[\"b\", \"c\"]", ["b", "c"]), ("epochs=3", 3.0), ("bf16=true", True),
    ("task=two words", "two words"), ("seed=7", 7), ("task=7", "7"),
    ("losses=[[\"kl\", 1]]", [["kl", 1]]), ("fields={group_size = 64}", {"group_size": 64}),
    ("fields.group_size=64", {"group_size": 64}), ("fields.group_size=row", {"group_size": "row"}),
])
def test_values_have_the_type_of_the_setting(path, pair, value):
    found = plain(recipes.settings(path, [pair]).at())
    assert found[pair.partition("=")[0].partition(".")[0]] == value


@pytest.mark.parametrize("pairs, words", [
    (["bacth=3"], "unknown setting 'bacth', did you mean batch?"),
    (["teacher.lrr=3"], "unknown setting 'teacher.lrr', did you mean teacher.lr?"),
    (["batch=many"], "batch=many: 'many' is not a whole number"),
    (["batch=1.5"], "'1.5' is not a whole number"),
    (["bf16=1"], "'1' is not true or false"),
    (["lr=true"], "is not a number"),
    (["batch"], "'batch' is no KEY=VALUE"),
    (["profile=smal"], "unknown profile 'smal', did you mean small?: mine has paper, small"),
    (["task.lr=3"], "unknown setting 'task.lr'"),
])
def test_arguments_that_are_refused(path, pairs, words):
    with pytest.raises(RecipeError) as error:
        recipes.settings(path, pairs)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("bacth = 3", "unknown setting 'bacth', did you mean batch?"),
    ("batch = \"3\"", "batch is '3', it should be a whole number"),
    ("[teacher]\nlrr = 1", "unknown setting 'teacher.lrr', did you mean teacher.lr?"),
    ("[by_task.two]\nbacth = 1", "by_task.two: unknown setting 'bacth'"),
    ("batch = ", "is no TOML file"),
    ("teacher = 3", "teacher is 3, it should be a table"),
])
def test_files_that_are_refused(path, tmp_path, text, words):
    user = tmp_path / "user.toml"
    user.write_text(text)
    with pytest.raises(RecipeError) as error:
        recipes.settings(path, (), user)
    assert words in str(error.value) and "user.toml" in str(error.value)


def test_a_recipe_is_found_by_name_file_or_toml(path, tmp_path):
    assert set(recipes.shipped()) == {"glue", "summarization", "translation", "causal_lm",
                                      "bert_pretrain"}
    assert recipes.find("glue")[0].name == "glue.py"
    assert recipes.find(str(path)) == (path, None)
    user = tmp_path / "user.toml"
    user.write_text('recipe = "glue"')
    assert recipes.find(str(user)) == (recipes.find("glue")[0], user)
    user.write_text('recipe = "mine.py"')
    assert recipes.find(str(user)) == (path, user)
    assert recipes.load(path).run(recipes.settings(path)) == {"task": "one"}


@pytest.mark.parametrize("name, words", [
    ("gleu", "unknown recipe 'gleu', did you mean glue?"),
    ("missing.py", "no such file: missing.py"),
    ("missing.toml", "no such file: missing.toml"),
])
def test_recipes_that_are_not_there(name, words):
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        recipes.find(name)


def test_a_file_that_names_no_recipe(tmp_path, path):
    user = tmp_path / "user.toml"
    user.write_text("batch = 3")
    with pytest.raises(RecipeError, match="does not say which recipe"):
        recipes.find(str(user))
    path.write_text("run = 3\n")
    with pytest.raises(RecipeError, match="has no function run"):
        recipes.load(path)


@pytest.mark.parametrize("name", recipes.shipped())
def test_the_recipes_that_come_with_bitlm(name):
    source = recipes.shipped()[name]
    assert len(source.read_text("utf-8").splitlines()) <= 150
    for profile in ("paper", "small"):
        found = recipes.settings(source, [f"profile={profile}", "out=x"])
        top, names = check(found)
        for scheme in ("w1a8", "w1a1"):
            check(recipes.settings(source, [f"profile={profile}", "out=x", f"scheme={scheme}",
                                            "weights=tbt"]))
        assert names and top.losses


def asked(**changes):
    return SimpleNamespace(**{key: COMMON[key] for key in COMMON if key not in (
        "fields", "teacher")} | {"fields": SimpleNamespace()} | changes)


def test_short_names_of_schemes():
    w1a8 = request(asked(scheme="w1a8"))
    assert w1a8.scheme.method == "binary" and w1a8.scheme.group_size == "row"
    assert w1a8.placement.inputs == Quantizer("dynamic", 8)
    assert request(asked(scheme="w1a16")).placement is None
    assert request(asked(scheme="w1.58a8")).scheme.method == "ternary"
    assert request(asked(scheme="w2a2")) == request(asked(scheme="W1.58A2"))
    plain_w1a1 = request(asked(scheme="w1a1", placement="bipft"))
    with_ranks = request(asked(scheme="w1a1+estimators", placement="bipft"))
    assert plain_w1a1.placement.attention.estimators == 0
    assert with_ranks.placement.attention.estimators == 1
    assert request(asked(scheme="w1a1", estimators=3)).placement.attention.estimators == 3
    assert request(asked(embeddings=1)).embeddings == EMBEDDINGS[1]
    assert request(asked(embeddings=8)).embeddings == 8
    assert request(asked(embeddings=0)).embeddings is None


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rules_of_weights(weights):
    found = request(asked(weights=weights, estimator="ede"))
    assert found.training.estimator == "ede"
    assert found.scheme == WEIGHTS[weights]["1"][0]


@pytest.mark.parametrize("changes, words", [
    ({"scheme": "w3a8"}, "unknown scheme 'w3a8'"),
    ({"scheme": "w1a16+estimators"}, "W1A16 rounds none"),
    ({"weights": "tbtt"}, "unknown weights 'tbtt': use one of tbt"),
    ({"weights": "bit", "scheme": "w1.58a8"}, "weights bit has no form with 1.58 bits"),
    ({"estimator": "ste"}, "unknown estimator 'ste'"),
    ({"placement": "tbtt"}, "unknown placement 'tbtt'"),
])
def test_schemes_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        request(asked(**changes))


def test_fields_of_the_scheme_are_checked():
    assert request(asked(fields=SimpleNamespace(group_size=64))).scheme.group_size == 64
    with pytest.raises(SchemeError, match="unknown scheme key 'grup'"):
        request(asked(fields=SimpleNamespace(grup=64)))


@pytest.mark.parametrize("pairs, words", [
    ([], "say where to write: out=FOLDER"),
    (["out=x", "scheme=w1a8,w1a8"], "scheme 'w1a8' comes twice"),
    (["out=x", "scheme=w1a8,w9a1"], "unknown scheme 'w9a1'"),
    (["out=x", "losses=[[\"kll\", 1.0]]"], "unknown loss 'kll', did you mean kl?"),
    (["out=x", "epochs=0"], "w1a8 would not train: set epochs or steps"),
    (["out=x", "batch=0"], "batch is 0: use 1 or more"),
    (["out=x", "teacher.batch=0"], "teacher.batch is 0: use 1 or more"),
    (["out=x", "schedule=linar"], "unknown schedule 'linar': use one of linear"),
])
def test_what_would_fail_later_is_said_first(path, pairs, words):
    with pytest.raises(ValueError) as error:
        check(recipes.settings(path, pairs))
    assert words in str(error.value)
