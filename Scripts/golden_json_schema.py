"""Writes Tests/ApusGrammarTests/Goldens/json_schema_random.jsonl: random schemas with random instances, judged by the
Python package jsonschema (made with 4.26.0).

    python3 -m venv venv && venv/bin/pip install jsonschema==4.26.0
    venv/bin/python Scripts/golden_json_schema.py
"""

import json
import pathlib
import random

from jsonschema import Draft202012Validator

SEED = 20261125
SCHEMAS = 240
NAMES = ["a", "b", "c", "dd"]
STRINGS = ["", "a", "b", "ab", "abc", "ba", "x1", "\u00e9", "\U0001f600", 'q"\\']
NUMBERS = [0, 1, 2, 3, 5, 7, 10, -1, -4, 0.5, 1.5, 2.25, -0.1, 100, 3.0, 12]
PATTERNS = ["^a", "b$", "^[ab]*$", "1", "^..$", "^(?!a)", "x|y"]


def schema(rng, depth):
    """A schema of a few keywords, some of which have nothing to do with each other."""
    if depth <= 0 or rng.random() < 0.08:
        return rng.choice([True, {}, {"type": "integer"}, {"type": "string"}, {"const": rng.choice(NAMES)}, {"type": "null"}])
    kind = rng.choice(["number", "string", "array", "object", "object", "combined", "combined", "enum", "any"])
    if kind == "number":
        result = {"type": rng.choice(["number", "integer"])}
        if rng.random() < 0.6:
            result[rng.choice(["minimum", "exclusiveMinimum"])] = rng.choice(NUMBERS)
        if rng.random() < 0.6:
            result[rng.choice(["maximum", "exclusiveMaximum"])] = rng.choice(NUMBERS)
        if rng.random() < 0.3:
            result["multipleOf"] = rng.choice([1, 2, 3, 5, 0.5, 0.25])
        return result
    if kind == "string":
        result = {"type": "string"}
        if rng.random() < 0.5:
            result["minLength"] = rng.randint(0, 2)
        if rng.random() < 0.5:
            result["maxLength"] = rng.randint(0, 3)
        if rng.random() < 0.5:
            result["pattern"] = rng.choice(PATTERNS)
        return result
    if kind == "array":
        result = {"type": "array"} if rng.random() < 0.8 else {}
        if rng.random() < 0.4:
            result["prefixItems"] = [schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.6:
            result["items"] = schema(rng, depth - 1)
        if rng.random() < 0.3:
            result["minItems"] = rng.randint(0, 2)
        if rng.random() < 0.3:
            result["maxItems"] = rng.randint(0, 3)
        if rng.random() < 0.25:
            result["contains"] = schema(rng, depth - 1)
            if rng.random() < 0.5:
                result["maxContains"] = rng.randint(1, 2)
        return result
    if kind == "object":
        result = {"type": "object"} if rng.random() < 0.8 else {}
        if rng.random() < 0.8:
            result["properties"] = {name: schema(rng, depth - 1) for name in rng.sample(NAMES, rng.randint(1, 3))}
        if rng.random() < 0.5:
            result["required"] = rng.sample(NAMES, rng.randint(1, 2))
        if rng.random() < 0.4:
            result["additionalProperties"] = rng.choice([False, False, schema(rng, depth - 1)])
        if rng.random() < 0.2:
            result["patternProperties"] = {rng.choice(["^a", "d", "^.$"]): schema(rng, depth - 1)}
        if rng.random() < 0.15:
            result["propertyNames"] = {"maxLength": 1}
        if rng.random() < 0.15:
            result["minProperties"] = rng.randint(1, 2)
        if rng.random() < 0.15:
            result["maxProperties"] = rng.randint(1, 2)
        if rng.random() < 0.15:
            first, second = rng.sample(NAMES, 2)
            result["dependentRequired"] = {first: [second]}
        if rng.random() < 0.1:
            result["dependentSchemas"] = {rng.choice(NAMES): schema(rng, depth - 1)}
        if rng.random() < 0.1:
            result["unevaluatedProperties"] = False
            result["anyOf"] = [schema(rng, depth - 1), schema(rng, depth - 1)]
        return result
    if kind == "combined":
        result = schema(rng, 0) if rng.random() < 0.2 else {}
        if not isinstance(result, dict):
            result = {}
        choice = rng.choice(["allOf", "anyOf", "oneOf", "oneOf", "not", "if"])
        if choice == "not":
            result["not"] = schema(rng, depth - 1)
        elif choice == "if":
            result["if"] = schema(rng, depth - 1)
            if rng.random() < 0.8:
                result["then"] = schema(rng, depth - 1)
            if rng.random() < 0.8:
                result["else"] = schema(rng, depth - 1)
        else:
            result[choice] = [schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]
        return result
    if kind == "enum":
        return {"enum": [value(rng, 2) for _ in range(rng.randint(1, 4))]}
    return {"$ref": "#/$defs/" + rng.choice(["first", "second"])}


def value(rng, depth):
    kind = rng.choice(["null", "boolean", "number", "number", "string", "string", "array", "object", "object"])
    if depth <= 0 and kind in ("array", "object"):
        kind = "string"
    if kind == "null":
        return None
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "number":
        return rng.choice(NUMBERS)
    if kind == "string":
        return rng.choice(STRINGS + NAMES)
    if kind == "array":
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {name: value(rng, depth - 1) for name in rng.sample(NAMES + ["e"], rng.randint(0, 3))}


def main():
    rng = random.Random(SEED)
    path = pathlib.Path(__file__).parent.parent / "Tests/ApusGrammarTests/Goldens/json_schema_random.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = []
    while len(lines) < SCHEMAS:
        root = schema(rng, 3)
        if not isinstance(root, dict):
            continue
        root["$defs"] = {"first": schema(rng, 2), "second": schema(rng, 1)}
        text = json.dumps(root)
        # References among the definitions may go round in circles without a value between, which is malformed.
        if "$ref" in json.dumps(root["$defs"]) or len(text) > 900:
            continue
        validator = Draft202012Validator(root)
        valid, invalid = [], []
        for _ in range(200):
            instance = value(rng, 3)
            (valid if validator.is_valid(instance) else invalid).append(instance)
        unique = lambda values: [json.loads(x) for x in dict.fromkeys(json.dumps(v) for v in values)][:8]
        lines.append(json.dumps({"schema": root, "valid": unique(valid), "invalid": unique(invalid)}))
    path.write_text("\n".join(lines) + "\n")


main()
