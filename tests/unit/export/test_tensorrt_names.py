"""Every TensorRT name and argument that the module uses is in the API reference, in branches no test runs too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tensorrt_fake import API, exists, fits, result_type, signatures

from diffpress.export import tensorrt as ours

SOURCE = Path(ours.__file__).read_text()
# What the variables of the module hold; the module keeps to these names.
OBJECTS = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "fault": "ParserError",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "network_input": "ITensor",
    "parser": "OnnxParser",
    "plan": "IHostMemory",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
}
MODULE_ATTRIBUTES = ("__version__",)  # not in the reference


def owner_of(node: ast.expr) -> str | None:
    """The TensorRT class that an expression denotes or is an instance of."""
    match node:
        case ast.Attribute(value=ast.Name(id="trt"), attr=name):
            return name
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
            return OBJECTS.get(name.removeprefix("_"))
    return None


def member_of(node: ast.AST) -> tuple[str, str] | None:
    match node:
        case ast.Attribute(value=value, attr=name) if owner_of(value):
            return owner_of(value), name  # type: ignore[return-value]
        case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]) if owner_of(value):
            return owner_of(value), name  # type: ignore[return-value]
    return None


def call_problem(node: ast.Call) -> str | None:
    kind, member = member_of(node.func) or (owner_of(node.func), "__init__")
    if kind not in API or not exists(kind, member) or isinstance(node.func, ast.Name):
        return None  # plain names are functions of ours; unknown names are found elsewhere
    keywords = {word.arg for word in node.keywords}
    if any(isinstance(argument, ast.Starred) for argument in node.args) or API[kind]["members"][member] == "property":
        return f"{kind}.{member} cannot be called like that"
    return None if fits(kind, member, len(node.args), keywords) else f"arguments of {kind}.{member}"


def uses(source: str) -> set[tuple[str, str]]:
    return {found for node in ast.walk(ast.parse(source)) if (found := member_of(node))}


def problems(source: str) -> list[str]:
    found = [f"{kind}.{name}" for kind, name in sorted(uses(source)) if kind not in API or not exists(kind, name)]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="trt"), attr=name) if name not in (*API, *MODULE_ATTRIBUTES):
                found.append(f"trt.{name}")
            case ast.Call() if problem := call_problem(node):
                found.append(problem)
            case ast.Assign(targets=[*targets], value=ast.Call(func=function)) if made := member_of(function):
                names = {owner_of(target) for target in targets}
                results = {result_type(text) for text in signatures(*made)} if exists(*made) else set()
                if results & set(API) and not names <= results:
                    found.append(f"{made[0]}.{made[1]} is kept under a name that the check does not follow")
    return found


def test_every_name_is_in_the_reference():
    assert problems(SOURCE) == []


def test_the_check_sees_the_module():
    seen = uses(SOURCE)
    assert len(seen) > 45
    assert seen >= {
        ("Builder", "build_serialized_network"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("OnnxParser", "parse_from_file"),
        ("IBuilderConfig", "profiling_verbosity"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("EngineInspector", "get_engine_information"),
    }


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),  # gone in TensorRT 11
        ("engine.get_binding_shape(0)", "ICudaEngine.get_binding_shape"),
        ("getattr(trt.BuilderFlag, 'MADE_UP', None)", "BuilderFlag.MADE_UP"),
        ("trt.MadeUp", "trt.MadeUp"),
        ("self._context.execute_async_v3()", "arguments of IExecutionContext.execute_async_v3"),
        ("profile.set_shape(name, low, high)", "arguments of IOptimizationProfile.set_shape"),
        ("config.set_timing_cache(cache, force=True)", "arguments of IBuilderConfig.set_timing_cache"),
        ("plan.nbytes()", "IHostMemory.nbytes cannot be called like that"),
        (
            "maker = config.create_timing_cache(b'')",
            "IBuilderConfig.create_timing_cache is kept under a name that the check does not follow",
        ),
    ],
)
def test_a_made_up_name_is_caught(source, problem):
    assert problems(source) == [problem]


def test_data_types_are_in_the_reference():
    assert set(ours.TORCH_TYPES) <= set(API["DataType"]["enum"])
