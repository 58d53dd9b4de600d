"""The shape of the code, and the recipes that it ships and refuses."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fusellm
from fusellm.config import RESERVED_NAMES, ObjectiveSettings, Recipe
from fusellm.errors import RecipeError
from fusellm.recipe_file import check_recipe, load_recipe
from fusellm.study.plan import load_study

ROOT = Path(fusellm.__file__).resolve().parent
RECIPES = Path(__file__).resolve().parents[1] / "recipes"

WORDS = ("errors", "config", "recipe_file", "progress", "compiled", "text_table")
MATHS = ("tokens", "arrays", "alignment", "fusion", "objective")
EDGES = (
    "store",
    "models",
    "merging",
    "reading",
    "zoo",
    "corpus",
    "evaluation",
    "training",
    "preflight",
)
DOORS = ("rounds", "pipeline", "plan", "run", "view", "study", "cli", "__main__")
IN_ORDER = (*WORDS, *MATHS, *EDGES, "stages", "explain", *DOORS)
"""A part imports itself and what stands before it; stages besides import no other stage."""

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 600, 60
_FACE = "a public function, whose docstring gives each argument, error and an example"
LONGER = {
    "evaluation/text/bits_per_byte.py:bits_per_byte": _FACE,
    "fusion/texts.py:fuse": _FACE,
    "reading/texts.py:read_distributions": _FACE,
    "training/loss.py:fusion_loss": _FACE,
}
"""`module` or `module:function` that is longer, and why."""

UNNAMED = frozenset({"found", "mine", "theirs"})
"""Names of values that say nothing about what they hold."""


def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Modules by their dotted name inside the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [*path.relative_to(root).parts[:-1], path.stem]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(module: str, tree: ast.Module, is_package: bool) -> Iterator[tuple[str, bool]]:
    """(dotted name inside fusellm, whether inside a function) of everything imported."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["fusellm", *(module.split(".") if module else [])]
                package = package[: len(package) - node.level + (1 if is_package else 0)]
                base = ".".join([*package, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "fusellm":
                yield name.removeprefix("fusellm").removeprefix("."), id(node) in inside


def faults_of(module: str, tree: ast.Module, is_package: bool) -> list[str]:
    """What a module imports against the bands."""
    faults = []
    own = module.split(".")
    for name, in_function in imports(module, tree, is_package):
        theirs = name.split(".")
        said = f"{module or 'fusellm'} imports {name or 'fusellm'}"
        if in_function and own[0] != "cli":
            faults.append(f"{said} inside a function")
        if not module or theirs[0] not in IN_ORDER:
            faults.append(f"{said}, which is in no band")
        elif own[0] not in IN_ORDER:
            faults.append(f"{module} is in no band")
        elif IN_ORDER.index(theirs[0]) > IN_ORDER.index(own[0]):
            faults.append(f"{said}, which stands after it")
        elif own[0] == theirs[0] == "stages" and theirs[1:2] not in (own[1:2], ["stage"]):
            faults.append(f"{said}: a stage imports a stage")
    return faults


def is_package(name: str) -> bool:
    return (ROOT / Path(*name.split("."))).is_dir() if name else True


def test_imports_go_one_way() -> None:
    found = sources()
    assert len(found) > 30
    assert [
        f for name, tree in found.items() for f in faults_of(name, tree, is_package(name))
    ] == []


@pytest.mark.parametrize(
    ("module", "statement", "fault"),
    [
        ("config", "from fusellm.tokens.walk import boundaries", "which stands after it"),
        ("config", "import fusellm.recipe_file", "which stands after it"),
        ("tokens.walk", "from fusellm.alignment import positions", "which stands after it"),
        ("tokens.walk", "from ..alignment import positions", "which stands after it"),
        ("tokens.walk", "from ..alignment.positions import align_shard", "which stands after it"),
        ("alignment.positions", "import fusellm.store.tables", "which stands after it"),
        ("models.load", "from fusellm.zoo import text", "which stands after it"),
        ("stages.fuse", "from fusellm.stages.train import run", "a stage imports a stage"),
        ("stages.fuse", "from fusellm.stages import train", "a stage imports a stage"),
        ("stages.fuse", "from . import train", "a stage imports a stage"),
        ("stages.report.page", "from ..fuse import identity", "a stage imports a stage"),
        ("stages.fuse", "from fusellm.pipeline import Pipeline", "which stands after it"),
        ("pipeline", "from fusellm.cli.main import main", "which stands after it"),
        ("explain.block", "from fusellm.cli.console import table", "which stands after it"),
        ("models.load", "def f():\n    import fusellm.errors", "inside a function"),
        ("models.load", "from fusellm.elsewhere import x", "in no band"),
        ("elsewhere", "from fusellm.errors import StoreError", "in no band"),
        ("tokens.walk", "from fusellm.errors import StoreError", None),
        ("alignment.positions", "from fusellm.tokens.walk import boundaries", None),
        ("tokens.walk", "from .vocabulary import Vocabulary", None),
        ("stages.report.page", "from fusellm.stages.report.charts import line_chart", None),
        ("stages.report.page", "from . import charts", None),
        ("stages.fuse", "from fusellm.stages.stage import Stage", None),
        ("cli.main", "def f():\n    from fusellm.pipeline import Pipeline", None),
        ("tokens.walk", "import numpy", None),
    ],
)
def test_the_check_of_imports_tells_right_from_wrong(
    module: str, statement: str, fault: str | None
) -> None:
    faults = faults_of(module, ast.parse(statement), is_package=False)
    assert (faults == []) if fault is None else (fault in faults[0])


def test_a_module_says_what_it_is_for() -> None:
    """In its first sentence; folders' own files are empty, or say it for the folder."""
    silent = [
        name
        for name, tree in sources().items()
        if not is_package(name) and not (ast.get_docstring(tree) or "").strip()
    ]
    assert silent == []


def test_sizes() -> None:
    long = {}
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT).as_posix()
        if len(text.splitlines()) > MOST_LINES:
            long[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long[f"{name}:{node.name}"] = lines
    assert {name: lines for name, lines in long.items() if name not in LONGER} == {}
    assert set(LONGER) <= set(long), "no longer longer"


def unnamed(tree: ast.Module) -> list[str]:
    """`name, line` of each variable and parameter whose name says nothing."""
    bound = [
        (node.lineno, node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    bound += [(node.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.arg)]
    return [f"{name}, line {line}" for line, name in sorted(bound) if name in UNNAMED]


def test_variables_say_what_they_hold() -> None:
    faults = {module: unnamed(tree) for module, tree in sources().items()}
    assert {module: names for module, names in faults.items() if names} == {}


def test_no_two_public_classes_have_one_name() -> None:
    where: dict[str, list[str]] = {}
    for module, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("found = 1", ["found"]),
        ("mine, (theirs, *found) = rows", ["found", "mine", "theirs"]),
        ("found: int = 1", ["found"]),
        ("found += 1", ["found"]),
        ("for found in rows: pass", ["found"]),
        ("with opened() as found: pass", ["found"]),
        ("rows = [mine for mine in rows]", ["mine"]),
        ("if (found := look()): pass", ["found"]),
        ("def align(theirs, /, mine, *, found): pass", ["found", "mine", "theirs"]),
        ("kept = lambda *found, **mine: 1", ["found", "mine"]),
        ("total = founds = found_ = 1", []),
        ("total = look(found, mine.theirs, found=theirs)", []),
        ("rows.found = 1", []),
        ("'found = 1'", []),
    ],
)
def test_the_check_of_names_tells_right_from_wrong(statement: str, names: list[str]) -> None:
    assert unnamed(ast.parse(statement)) == [f"{name}, line 1" for name in names]


# Recipes


def raw(**changes: Any) -> dict[str, Any]:
    """The least recipe there is."""
    return {
        "name": "least",
        "target": {"model": "zoo/prose"},
        "sources": [{"name": "prose", "model": "zoo/prose"}],
        "corpus": {"documents": [{"builtin": "prose"}]},
    } | changes


def fault_of(recipe: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: ")
    assert "\n" not in message
    return message.removeprefix("some.yaml: ")


SHIPPED = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_and_studies(path: Path) -> None:
    if path.name.startswith("study-"):
        assert load_study(path).settings.name == path.stem
    else:
        assert load_recipe(path).name == path.stem


def test_the_least_recipe() -> None:
    recipe = check_recipe(raw(), "here")
    assert recipe.objective.lambda_ == 0.9
    assert recipe.externalize.scheme == "sampled"
    again = check_recipe(recipe.model_dump(by_alias=True), "here")
    assert again == recipe


UNKNOWN = [
    (raw(sourcs=[]), "unknown key sourcs; did you mean sources?"),
    (raw(target={"model": "x", "dtyp": "float32"}), "unknown key target.dtyp; did you mean dtype?"),
    (raw(objective={"lamda": 0.5}), "unknown key objective.lamda; did you mean lambda?"),
    (
        raw(sources=[{"name": "a", "model": "x"}, {"name": "b", "model": "x", "modl": "y"}]),
        "unknown key sources.1.modl; did you mean model?",
    ),
    (
        raw(corpus={"documents": [{"builtin": "prose"}, {"builtin": "cpp", "wieght": 2}]}),
        "unknown key corpus.documents.1.wieght; did you mean weight?",
    ),
    (
        raw(corpus={"documents": [{"hub": "x", "validation_splt": "v"}]}),
        "unknown key corpus.documents.0.validation_splt; did you mean validation_split?",
    ),
    (
        raw(corpus={"documents": [{"hub": "x", "validation_share": 0.1}]}),
        "unknown key corpus.documents.0.validation_share; it belongs further out, as "
        "corpus.validation_share",
    ),
    (
        raw(training={"lora": {"keep": "best"}}),
        "unknown key training.lora.keep; it belongs further out, as training.keep",
    ),
    (
        raw(sources=[{"name": "a", "model": "x", "seed": 3}]),
        "unknown key sources.0.seed; it belongs further out, as seed",
    ),
    (
        raw(corpus={"documents": [{"builtin": "prose"}], "blok_bytes": 9}),
        "unknown key corpus.blok_bytes; did you mean block_bytes?",
    ),
    (
        raw(externalize={"zzzzzz": 1}),
        "unknown key externalize.zzzzzz; known: scheme, draws, k, mass, batch_tokens, "
        "not_finite_share, changed_share",
    ),
]


@pytest.mark.parametrize(("recipe", "fault"), UNKNOWN, ids=[fault for _, fault in UNKNOWN])
def test_unknown_keys_are_named_with_the_nearest_known(recipe: dict[str, Any], fault: str) -> None:
    assert fault_of(recipe) == fault


def test_a_suggested_key_of_a_document_is_one_that_this_kind_takes() -> None:
    """`split` is the hub's; a builtin entry has none to offer."""
    fault = fault_of(raw(corpus={"documents": [{"builtin": "prose", "split": "train"}]}))
    assert fault == "unknown key corpus.documents.0.split; known: builtin, weight"


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        (raw(corpus={"documents": [{"weight": 1}]}), "corpus.documents.0: an entry needs one of"),
        (raw(corpus={"documents": ["prose"]}), "corpus.documents.0: an entry needs one of"),
        (raw(corpus={"documents": []}), "corpus.documents: "),
        (raw(target={}), "target.model is missing"),
        (raw(sources=[]), "sources: "),
        (raw(objective={"lambda": 1.5}), "objective.lambda: "),
        (raw(fusion={"strategy": "mind"}), "fusion.strategy: "),
        (raw(externalize={"draws": 256}), "externalize.draws: "),
        (
            raw(corpus={"documents": [{"builtin": "prose"}], "block_bytes": 3}),
            "corpus.block_bytes: ",
        ),
        (
            raw(corpus={"documents": [{"builtin": "cpp"}], "train_bytes": 9, "train_tokens": 9}),
            "corpus: set train_bytes or train_tokens, not both",
        ),
        (raw(name="a/b"), "name: "),
        (raw(name="../up"), "name: "),
        (raw(sources=[{"name": "a\n", "model": "x"}]), "sources.0.name: "),
    ],
)
def test_wrong_values_are_named_by_their_place(recipe: dict[str, Any], part: str) -> None:
    assert fault_of(recipe).startswith(part)


def test_every_fault_is_named() -> None:
    fault = fault_of(raw(target={}, seed=-1, fuson={}))
    assert "target.model is missing; " in fault
    assert "seed: " in fault
    assert "unknown key fuson; did you mean fusion?" in fault


def test_an_empty_block_is_its_defaults() -> None:
    assert check_recipe(raw() | {"fusion": None, "training": None}, "here") == check_recipe(
        raw(), "here"
    )
    assert fault_of(raw() | {"corpus": None}) == "corpus is missing"


def test_every_domain_has_a_route_to_a_source_that_teaches() -> None:
    entries = {"documents": [{"builtin": "prose"}, {"builtin": "cpp"}]}
    two = [{"name": "a", "model": "x"}, {"name": "b", "model": "y", "referee": True}]

    def fault(**routes: str) -> str:
        fusion = {"function": "route", "routes": routes}
        return fault_of(raw(corpus=entries, sources=two, fusion=fusion))

    assert "the corpus has no domain 'python'; it has prose, cpp" in fault(python="a")
    assert "fusion.routes.cpp: 'b' is no source that teaches" in fault(prose="a", cpp="b")
    assert "the domain 'cpp' has no source; name one of a" in fault(prose="a")
    routes = {"function": "route", "routes": {"prose": "a", "cpp": "a"}}
    check_recipe(raw(corpus=entries, sources=two, fusion=routes), "here")


def test_two_sources_of_one_name_are_refused() -> None:
    same = [{"name": "twin", "model": model} for model in ("zoo/prose", "zoo/cpp")]
    assert "two are named 'twin'" in fault_of(raw(sources=same))


@pytest.mark.parametrize("name", RESERVED_NAMES)
def test_names_of_results_are_refused(name: str) -> None:
    assert f"{name!r} is a result's name" in fault_of(raw(sources=[{"name": name, "model": "x"}]))


def test_draws_cannot_be_renormalized() -> None:
    refused = raw(externalize={"scheme": "sampled"}, objective={"rest": "renormalize"})
    assert fault_of(refused).startswith("objective.rest: renormalize has no meaning with")
    check_recipe(refused | {"externalize": {"scheme": "top"}}, "here")


TOP = {"scheme": "top"}
WITHOUT_MEANING = [
    (
        {"divergence": "reverse_kl"},
        {},
        "objective.divergence: reverse_kl, which asks for the fused",
    ),
    (
        {"divergence": "reverse_kl", "rest": "renormalize"},
        TOP,
        "with rest: renormalize, where what was not kept has none; use bucket",
    ),
    (
        {"divergence": "reverse_kl", "strategy": "em", "compatibility": "paper"},
        TOP,
        "with compatibility: paper, which puts all mass on one token",
    ),
    ({"temperature": 2, "strategy": "bytes"}, TOP, "objective.temperature: 2 flattens the"),
    (
        {"temperature": 2, "strategy": "bytes"},
        {},
        "it needs externalize.scheme: top, objective.rest: renormalize; set that",
    ),
    (
        {"temperature": 2, "rest": "renormalize"},
        TOP,
        "fusion.strategy: bytes (or mined, em); set that",
    ),
    (
        {"token_healing": True, "strategy": "em"},
        {},
        "fusion.token_healing: true belongs to strategy partition, bytes or bpm, not to em",
    ),
    (
        {"inside_tokens": True, "token_healing": False},
        {},
        "fusion.inside_tokens: true needs token_healing: true",
    ),
    ({"refine": "path", "strategy": "bytes"}, {}, "refine: path belongs to strategy partition"),
    ({"refine": "none", "strategy": "bpm"}, {}, "refine: none does not go with strategy bpm"),
    ({"function": "best", "hindsight": False}, {}, "go with function: best, which sees the true"),
    ({"function": "avgce_paper", "hindsight": False}, {}, "avgce_paper, which is of whole blocks"),
    (
        {"cross_entropy": "nats_per_token", "granularity": "block", "hindsight": False},
        {},
        "hindsight: false does not go with cross_entropy: nats_per_token",
    ),
    ({"function": "route"}, {}, "function: route needs fusion.routes, a source for each domain"),
    ({"routes": {"prose": "a"}}, {}, "fusion.routes has no meaning with function: mince"),
    (
        {"lambda_schedule": "linear"},
        {},
        "lambda_schedule: linear needs objective.lambda_end",
    ),
    (
        {"lambda_schedule": "cosine"},
        {},
        "lambda_schedule: cosine needs objective.lambda_end",
    ),
    ({"lambda_end": 0.5}, {}, "objective.lambda_end: 0.5 has no meaning with lambda_schedule: con"),
    (
        {"lambda_schedule": "authors", "lambda_end": 0.5},
        {},
        "has no meaning with lambda_schedule: authors, which ends at 1; use linear",
    ),
]


def blocks_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the blocks of the stages that read them."""
    known = {field.alias or name for name, field in ObjectiveSettings.model_fields.items()}
    own = {key: value for key, value in settings.items() if key in known}
    return {"objective": own, "fusion": {k: v for k, v in settings.items() if k not in known}}


@pytest.mark.parametrize("key", ["lambda", "lambda_end", "divergence", "temperature", "rest"])
def test_an_old_key_is_refused_with_the_new_ones_name(key: str) -> None:
    message = f"unknown key fusion.{key}; did you mean objective.{key}, which train reads?"
    assert message in fault_of(raw(fusion={key: 0.5}))


@pytest.mark.parametrize(("fusion", "kept", "part"), WITHOUT_MEANING)
def test_combinations_without_a_meaning_are_refused(
    fusion: dict[str, Any], kept: dict[str, Any], part: str
) -> None:
    assert part in fault_of(raw(**blocks_of(fusion), externalize=kept))


@pytest.mark.parametrize(
    ("fusion", "kept"),
    [
        ({"divergence": "kl"}, {}),
        ({"divergence": "reverse_kl"}, TOP),
        ({"divergence": "reverse_kl", "function": "avgce", "strategy": "em"}, TOP),
        *(
            ({"temperature": 2, "rest": "renormalize", "strategy": strategy}, TOP)
            for strategy in ("bytes", "mined", "em")
        ),
        ({"lambda_schedule": "authors"}, {}),
        ({"lambda_schedule": "cosine", "lambda_end": 1}, {}),
    ],
)
def test_combinations_with_a_meaning_are_taken(fusion: dict[str, Any], kept: Any) -> None:
    check_recipe(raw(**blocks_of(fusion), externalize=kept), "here")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"training": {"validations": 0, "keep": "best"}},
            "training.keep: best goes by validations",
        ),
        (
            {"training": {"validations": 0, "early_stop_validations": 3}},
            "training.early_stop_validations goes by validations",
        ),
        (
            {
                "training": {"lora": {"merge": False}},
                "target": {"model": "x", "device_map": "auto"},
            },
            "training.lora.merge: false has no meaning with target.device_map",
        ),
        ({"training": {"lora": {"rank": 4}}}, "unknown key training.lora.rank"),
        ({"training": {"lora": {"r": 0}}}, "training.lora.r: "),
    ],
)
def test_settings_of_training_that_clash_are_refused(changes: dict[str, Any], part: str) -> None:
    assert part in fault_of(raw(**changes))


def load(tmp_path: Path, *changes: str, text: str | None = None) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        text
        if text is not None
        else "name: set\ntarget: {model: zoo/prose}\n"
        "sources:\n  - {name: a, model: x}\n  - {name: b, model: y}\n"
        "corpus: {documents: [{builtin: prose}, {builtin: cpp}]}\n",
        encoding="utf-8",
    )
    return load_recipe(path, changes)


def test_set_changes_values_at_any_depth(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "seed=7",
        "objective.lambda=0.25",
        "sources.1.model=zoo/cpp",
        "corpus.documents.0.weight=3",
        "corpus.documents.1={builtin: python}",
        "training.learning_rate=1.0e-4",
        "externalize={scheme: top, k: 5, mass: null}",
    )
    assert recipe.seed == 7
    assert recipe.objective.lambda_ == 0.25
    assert [source.model for source in recipe.sources] == ["x", "zoo/cpp"]
    assert [entry.weight for entry in recipe.corpus.documents] == [3, 1]
    assert [entry.domain for entry in recipe.corpus.documents] == ["prose", "python"]
    assert recipe.training.arguments == {"learning_rate": 1e-4}
    assert (recipe.externalize.k, recipe.externalize.mass) == (5, None)


def test_set_fills_a_block_that_is_empty_in_the_file(tmp_path: Path) -> None:
    text = (
        "name: empty\ntarget: {model: x}\nsources: [{name: a, model: x}]\n"
        "corpus: {documents: [{builtin: cpp}]}\nfusion:\n"
    )
    assert load(tmp_path, "objective.lambda=0.5", text=text).objective.lambda_ == 0.5


def test_of_two_changes_the_later_stands(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("seed", "must be KEY=VALUE"),
        ("sources.2.model=z", "the entries 0 to 1"),
        ("sources.2={name: c, model: z}", "the entries 0 to 1"),
        ("sources.-1.model=z", "the entries 0 to 1"),
        ("sources.a.model=z", "the entries 0 to 1"),
        ("name.x=1", "'name' is not a block"),
        ("seed=[1", "is not YAML"),
        ("sources.0.nmae=z", "unknown key sources.0.nmae; did you mean name?"),
        ("fusoin.lambda=1", "unknown key fusoin; did you mean fusion?"),
    ],
)
def test_set_that_leads_nowhere_is_refused(tmp_path: Path, change: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, change)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [", "is not YAML"),
        ("- 1", "must have keys with values, like name: my-run, and is a list"),
        ("", "must have keys with values, like name: my-run, and is empty"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=text)
    assert part in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*fusellm init"):
        load_recipe(tmp_path / "none.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text."""
    path = tmp_path / "recipe.yaml"
    text = (RECIPES / "demo.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("2.0e-3", "2e-3"), encoding="utf-8")
    assert load_recipe(path).training.arguments["learning_rate"] == 0.002
    assert load_recipe(path, ["objective.lambda=1e-1"]).objective.lambda_ == 0.1
