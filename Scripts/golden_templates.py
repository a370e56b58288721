#!/usr/bin/env python3
"""Cases for the chat-template interpreter, rendered by jinja2 with the settings of Hugging Face transformers.

    golden_templates.py generate --seed 7 --count 1500 --output Tests/ApusTokenizationTests/Fixtures/template_cases.jsonl

writes one case a line: {"template", "vars", "rendered"} or {"template", "vars", "error"}. `fuzz_templates.py` compares
many more with a running program. Needs jinja2 3.1.6.
"""

import argparse
import datetime
import functools
import json
import pathlib
import random
import re
import sys

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 1, 15, 12, 0)


class Generation(Extension):
    """The block that marks what an assistant wrote; it renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


class Dictionary:
    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class TemplateNamespace(jinja2.utils.Namespace):
    def __init__(*args, **kwargs):
        values = dict(*args[1:], **kwargs)
        for name in values:
            TemplateNamespace.check(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name, value):
        TemplateNamespace.check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                "Chat templates cannot store underscore-prefixed attributes on a namespace, but got "
                f"{name!r}. Please rename the attribute."
            )


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    env.globals["dict"] = Dictionary()
    env.globals["namespace"] = TemplateNamespace
    return env


ENVIRONMENT = environment()


@functools.lru_cache(maxsize=256)
def compile_template(template):
    return ENVIRONMENT.from_string(template)


def render(template, variables):
    try:
        compiled = compile_template(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"error": f"Compile: {error.message}"}
    except (SyntaxError, AssertionError) as error:
        return {"error": f"Compile: {error}"}
    except RecursionError:
        return {"error": "RecursionError"}
    try:
        return {"rendered": compiled.render(**variables)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# Random templates ----------------------------------------------------------------------------------------------------

TEXTS = ["", "a", "Hello", "hello world", " padded \n", "\t tab", "é", "日本語", "😀 ok", "<b>&\"'</b>", "a,b,c", "12", "-3", "4.5",
         "1e3", "0x1f", "x=1", "A-b_c (d) [e] {f}", "line1\nline2\r\nline3", "a  b   c", "ß", "ÀÉ", "ΑΣ", "%s", "{}", "{0}", "user",
         "system", "content", "None", "\u2028", "\u00a0x\u3000", "ǅ", "İ", "ﬁ", "e\u0301", "'", "\"", "\\", "\x00\x1b", "aaa", "abcabc"]
STRING_METHODS = [
    "upper()", "lower()", "strip()", "lstrip()", "rstrip()", "title()", "capitalize()", "swapcase()", "split()",
    "rsplit()", "splitlines()", "splitlines(true)", "isdigit()", "isalpha()", "isalnum()", "isspace()", "isupper()",
    "islower()", "istitle()", "isnumeric()", "isdecimal()", "isascii()", "isprintable()", "isidentifier()", "expandtabs()",
]
FILTERS0 = ["abs", "capitalize", "count", "length", "dictsort", "e", "escape", "first", "float", "int", "items", "join", "last", "list",
            "lower", "max", "min", "reverse", "round", "safe", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "unique",
            "upper", "urlencode", "wordcount", "xmlattr", "center", "indent", "default", "d", "forceescape", "filesizeformat", "truncate"]
TESTS0 = ["defined", "undefined", "none", "boolean", "false", "true", "integer", "float", "lower", "upper", "string", "mapping", "number",
          "sequence", "iterable", "callable", "escaped", "odd", "even"]
NAMES = ["s", "t", "n", "m", "f", "b", "z", "xs", "ys", "d", "e", "none_value", "missing", "messages", "tools", "empty", "nested"]


def literal(text):
    """A string literal of the template language."""
    quote = random.choice("'\"")
    out = []
    for c in text:
        if c == quote or c == "\\":
            out.append("\\" + c)
        elif c == "\n" and random.random() < 0.8:
            out.append("\\n")
        elif c in "\r\x00\x1b\u2028":
            out.append(f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}")
        else:
            out.append(c)
    return quote + "".join(out) + quote


def small_int():
    return random.choice([0, 1, 2, 3, 5, 7, 10, 17, 100, 1000000, -1, -2, -3, -7])


def a_string(depth):
    r = random.random()
    if depth <= 0 or r < 0.35:
        return random.choice([literal(random.choice(TEXTS)), "s", "t", "d.name", "d['a b']", "messages[0].content", "messages[0]['role']"])
    if r < 0.5:
        return f"({a_string(depth - 1)} + {a_string(depth - 1)})"
    if r < 0.58:
        return f"({expression(depth - 1)} ~ {expression(depth - 1)})"
    if r < 0.75:
        return a_string(depth - 1) + "." + string_method(depth - 1)
    if r < 0.85:
        return f"({a_string(depth - 1)} | {random.choice(['upper', 'lower', 'trim', 'title', 'capitalize', 'e', 'string', 'indent(2)', 'safe', 'striptags', 'reverse'])})"
    if r < 0.92:
        return f"({expression(depth - 1)} | string)"
    return f"{a_string(depth - 1)}{a_slice(depth - 1)}"


def string_method(depth):
    s = lambda: a_string(depth - 1)
    n = lambda: str(small_int()) if random.random() < 0.8 else expression(depth - 1)
    return random.choice([
        lambda: random.choice(STRING_METHODS),
        lambda: f"split({s()})", lambda: f"split({s()}, {n()})", lambda: f"split(none, {n()})", lambda: f"rsplit({s()}, {n()})",
        lambda: f"split(maxsplit={n()})", lambda: f"split(sep={s()}, maxsplit=1)", lambda: f"rsplit(none, {n()})",
        lambda: f"strip({s()})", lambda: f"lstrip({s()})", lambda: f"rstrip({s()})",
        lambda: f"startswith({s()})", lambda: f"endswith({s()})", lambda: f"startswith(({s()}, {s()}))", lambda: f"endswith({s()}, {n()})",
        lambda: f"startswith({s()}, {n()}, {n()})", lambda: f"replace({s()}, {s()})", lambda: f"replace({s()}, {s()}, {n()})",
        lambda: f"find({s()})", lambda: f"rfind({s()})", lambda: f"index({s()})", lambda: f"count({s()})", lambda: f"find({s()}, {n()}, {n()})",
        lambda: f"rfind({s()}, {n()})", lambda: f"count({s()}, {n()})", lambda: f"rindex({s()})",
        lambda: f"join({a_list(depth - 1)})", lambda: f"removeprefix({s()})", lambda: f"removesuffix({s()})", lambda: f"zfill({random.randint(-2, 12)})",
        lambda: f"center({random.randint(-2, 12)})", lambda: f"center({random.randint(0, 12)}, {s()})", lambda: f"ljust({random.randint(0, 9)})",
        lambda: f"rjust({random.randint(0, 9)}, '*')", lambda: f"partition({s()})", lambda: f"rpartition({s()})",
        lambda: f"format({expression(depth - 1)}, {expression(depth - 1)})", lambda: f"expandtabs({random.randint(0, 5)})",
    ])()


def a_slice(depth):
    part = lambda: random.choice(["", "", str(small_int()), str(random.randint(-4, 4)), a_number(depth - 1) if random.random() < 0.2 else "1"])
    if random.random() < 0.4:
        return f"[{part()}:{part()}:{random.choice(['', '1', '2', '-1', '-2', '0', '3'])}]"
    return f"[{part()}:{part()}]"


def a_number(depth):
    r = random.random()
    if depth <= 0 or r < 0.4:
        return random.choice([str(abs(small_int())), f"-{abs(small_int())}", "n", "m", "f", "1.5", "2.0", "-0.25", "1e20", "3.14159", "0.1", "1e-7", "123456789.123"])
    if r < 0.8:
        return f"({a_number(depth - 1)} {random.choice(['+', '-', '*', '/', '//', '%', '+', '-', '*'])} {a_number(depth - 1)})"
    if r < 0.85:
        return f"({a_number(depth - 1)} ** {random.choice(['0', '1', '2', '3', '-1', '0.5'])})"
    if r < 0.9:
        return f"(-{a_number(depth - 1)})"
    return f"({expression(depth - 1)} | {random.choice(['length', 'int', 'float', 'abs', 'round', 'round(1)', 'sum', 'int(7)', 'float(1.5)', 'round(2, ' + repr('floor') + ')', 'round(1, ' + repr('ceil') + ')', 'round(-1)'])})"


def a_list(depth):
    r = random.random()
    if depth <= 0 or r < 0.25:
        return random.choice(["xs", "ys", "empty", "messages", "[]", "[1, 2, 3]", "['b', 'A', 'c']", "(1, 'x')", "range(4)", "tools"])
    if r < 0.5:
        items = ", ".join(expression(depth - 1) for _ in range(random.randint(0, 3)))
        return f"[{items}]"
    if r < 0.6:
        return f"({a_list(depth - 1)} + {a_list(depth - 1)})"
    if r < 0.7:
        return f"{a_list(depth - 1)}{a_slice(depth - 1)}"
    if r < 0.8:
        return f"({a_list(depth - 1)} | {random.choice(['list', 'sort', 'reverse | list', 'unique | list', 'map(' + repr('upper') + ') | list', 'map(' + repr('length') + ') | list', 'select | list', 'reject(' + repr('none') + ') | list', 'select(' + repr('string') + ') | list', 'batch(2) | list', 'slice(2) | list', 'batch(3, 0) | list', 'slice(3, none) | list', 'sort(reverse=true)', 'sort(case_sensitive=true)', 'map(' + repr('string') + ') | list'])})"
    if r < 0.92:
        return random.choice(["messages | map(attribute='role') | list", "messages | selectattr('role', 'equalto', 'user') | list",
                              "messages | rejectattr('content', 'none') | list", "messages | selectattr('tool_calls', 'defined') | list",
                              "messages | selectattr('content') | map(attribute='content') | list", "d.items() | list", "d.keys() | list", "d | dictsort",
                              "d.values() | list", "messages | map(attribute='missing', default='-') | list", "messages | groupby('role') | list",
                              "messages | sort(attribute='role') | map(attribute='role') | list", "nested.list", "messages | selectattr('role', 'in', ['user', 'tool']) | list",
                              "d | items | list", "messages | map('tojson') | list", "e | dictsort(by='value')", "d | dictsort(true, reverse=true)",
                              "messages | map(attribute='content.0') | list", "messages | rejectattr('role', 'eq', 'user') | list"])
    return f"({a_string(depth - 1)} | list)"


def a_dict(depth):
    if depth <= 0 or random.random() < 0.5:
        return random.choice(["d", "e", "{}", "messages[0]", "nested", "{'a': 1, 'b': none}", "dict(x=1, y='z')"])
    items = ", ".join(f"{random.choice([a_string(0), a_number(0), 'true', 'none', '(1, 2)'])}: {expression(depth - 1)}" for _ in range(random.randint(0, 3)))
    return "{" + items + "}"


def a_condition(depth):
    r = random.random()
    if depth <= 0 or r < 0.1:
        return random.choice(["true", "false", "b", "none", "missing", "s"])
    if r < 0.35:
        op = random.choice(["==", "!=", "<", "<=", ">", ">=", "in", "not in", "=="])
        return f"({expression(depth - 1)} {op} {expression(depth - 1)})"
    if r < 0.4:
        kind = random.choice([a_number, a_string])
        return f"({kind(depth - 1)} {random.choice(['<', '<=', '==', '!='])} {kind(depth - 1)} {random.choice(['<', '>', '=='])} {kind(depth - 1)})"
    if r < 0.65:
        test = random.choice(TESTS0 + ["divisibleby 3", "divisibleby(2)", f"eq({expression(depth - 1)})", f"in({a_list(depth - 1)})", "sameas none", "sameas true",
                                        f"ne {expression(0)}", f"gt({a_number(depth - 1)})", "lessthan 3", "equalto 'user'", f"in {a_list(0)}"])
        return f"({expression(depth - 1)} is {random.choice(['', 'not '])}{test})"
    if r < 0.8:
        return f"({a_condition(depth - 1)} {random.choice(['and', 'or'])} {a_condition(depth - 1)})"
    return f"(not {a_condition(depth - 1)})"


def expression(depth):
    r = random.random()
    if depth <= 0:
        return random.choice([a_string, a_number, a_list, a_dict, lambda _: random.choice(NAMES), lambda _: random.choice(["true", "false", "none"])])(0)
    if r < 0.22:
        return a_string(depth)
    if r < 0.36:
        return a_number(depth)
    if r < 0.5:
        return a_list(depth)
    if r < 0.56:
        return a_dict(depth)
    if r < 0.68:
        return a_condition(depth)
    if r < 0.74:
        otherwise = f" else {expression(depth - 1)}" if random.random() < 0.8 else ""
        return f"({expression(depth - 1)} if {a_condition(depth - 1)}{otherwise})"
    if r < 0.86:
        arguments = random.choice([
            lambda: random.choice(FILTERS0), lambda: random.choice(FILTERS0), lambda: f"default({expression(depth - 1)}, {random.choice(['true', 'false'])})",
            lambda: f"join({a_string(depth - 1)})", lambda: f"replace({expression(depth - 1)}, {expression(depth - 1)})", lambda: f"tojson(indent={random.choice(['0', '1', '2', '4', 'none', repr('--')])})",
            lambda: "tojson(separators=(',', ':'))", lambda: "tojson(sort_keys=true)", lambda: "tojson(ensure_ascii=true)", lambda: f"indent({random.randint(0, 4)}, {random.choice(['true', 'false'])})",
            lambda: f"indent({random.choice(['2', repr('> ')])}, blank=true)", lambda: f"attr({a_string(0)})", lambda: f"truncate({random.randint(0, 9)})", lambda: f"truncate({random.randint(3, 9)}, true, '..', 0)",
            lambda: f"format({expression(depth - 1)})", lambda: f"trim({a_string(depth - 1)})", lambda: f"int({expression(0)}, {random.choice(['2', '8', '10', '16', '0', '36'])})", lambda: f"center({random.randint(0, 12)})",
            lambda: f"sum(start={expression(0)})", lambda: "max(attribute='role')", lambda: "min", lambda: "select('odd') | list", lambda: "map(attribute=0) | list", lambda: "unique(attribute='role') | list",
            lambda: "join(', ', attribute='role')", lambda: "filesizeformat(true)", lambda: "xmlattr(false)", lambda: "items | list", lambda: "dictsort(false, 'value')",
        ])()
        return f"({expression(depth - 1)} | {arguments})"
    if r < 0.93:
        return f"{expression(depth - 1)}{random.choice(['[0]', '[-1]', '.name', '.get(' + a_string(0) + ')', '[' + repr('content') + ']', '.items()', '[1]', '.get(' + repr('x') + ', 5)', '.append(1)', '.role', '.0', '[n]', '.keys()', '.count(1)', '.index(2)', '.pop()', '.__class__', '[xs]', '.copy()', '.values() | list'])}"
    if r < 0.97:
        return f"{a_string(depth - 1)} % {expression(depth - 1)}" if random.random() < 0.4 else f"({a_string(depth - 1)} * {random.randint(-1, 4)})"
    return f"[{expression(depth - 1)}, {expression(depth - 1)}]"


def tag(inner, statement=True):
    left = random.choice(["", "", "", "-", "+"])
    right = random.choice(["", "", "", "-", "+" if statement else ""])
    space = random.choice([" ", " ", "  ", "\n "])
    if statement:
        return "{%" + left + space + inner + space + right + "%}"
    return "{{" + left + space + inner + space + ("-" if right == "-" else "") + "}}"


def data():
    return "".join(random.choice(["x", " ", "\n", "  ", "text", "\n\n", "\t", "é", "<b>", "{ ", "} ", "%", "#", "\r\n", " y "]) for _ in range(random.randint(0, 4)))


VARIABLES = ["v", "w", "s", "xs", "item", "u"]


def statements(depth, in_loop=False, count=None):
    return "".join(statement(depth, in_loop) for _ in range(count or random.randint(1, 3)))


def statement(depth, in_loop):
    r = random.random()
    if r < 0.2:
        return data()
    if depth <= 0 or r < 0.38:
        name = random.choice(VARIABLES + ["loop.index", "loop.first", "ns.v"])
        return tag(random.choice([name, name, expression(1)]), False)
    if r < 0.45:
        return "{#" + random.choice(["", "-", "+"]) + " comment " + random.choice(["", "-", "+"]) + "#}" + random.choice(["", "\n", "  \n"])
    if r < 0.58:
        v = random.choice(VARIABLES)
        kind = random.random()
        if kind < 0.6:
            return tag(f"set {v} = {expression(1)}")
        if kind < 0.7:
            return tag(f"set {v}, {random.choice(VARIABLES)} = {expression(1)}, {expression(0)}")
        if kind < 0.8:
            return tag(f"set ns.v = {expression(1)}")
        return tag(f"set {v}{random.choice(['', ' | upper', ' | trim', ' | replace(' + repr('x') + ', ' + repr('yy') + ')'])}") + statements(depth - 1, in_loop) + tag("endset")
    if r < 0.74:
        target = random.choice(["item", "item", "v", "item, u"])
        over = random.choice(["xs", "messages", "range(3)", "'ab'", "d", "d.items()", "[]", "[[1, 2], [3, 4]]", "nested.list", a_list(1), "xs | map('string')", "missing", "ys | select"])
        if target == "item, u":
            over = random.choice(["d.items()", "[[1, 2], [3, 4]]", "{'p': 1}.items()", "['ab', 'cd']", over])
        condition = f" if {random.choice([a_condition(1), 'item', 'loop is undefined', 'item != 2', 'v'])}" if random.random() < 0.3 else ""
        recursive = " recursive" if random.random() < 0.08 else ""
        body = statements(depth - 1, True)
        if random.random() < 0.6:
            body += tag(random.choice(["loop.index", "loop.index0", "loop.first", "loop.last", "loop.length", "loop.revindex", "loop.revindex0", "loop.previtem", "loop.nextitem",
                                       "loop.cycle('a', 'b', 'c')", "loop.changed(item)", "loop.depth", "item", "v", "loop.depth0", "loop.nextitem is defined"]), False)
        if recursive:
            body += tag("loop(item.children) if item.children", False)
        otherwise = tag("else") + statements(depth - 1, in_loop) if random.random() < 0.25 else ""
        return tag(f"for {target} in {over}{condition}{recursive}") + body + otherwise + tag("endfor")
    if r < 0.86:
        parts = tag(f"if {a_condition(1)}") + statements(depth - 1, in_loop)
        if random.random() < 0.3:
            parts += tag(f"elif {a_condition(1)}") + statements(depth - 1, in_loop)
        if random.random() < 0.5:
            parts += tag("else") + statements(depth - 1, in_loop)
        return parts + tag("endif")
    if r < 0.89 and in_loop:
        return tag(random.choice(["break", "continue"])) if random.random() < 0.5 else tag("if " + a_condition(1)) + tag(random.choice(["break", "continue"])) + tag("endif")
    if r < 0.92:
        name = random.choice(["f1", "f2"])
        signature = random.choice(["", "a", "a, v=1", "a=s, w=xs", "v"])
        body = statements(depth - 1) + random.choice(["", tag("a", False), tag("varargs", False), tag("kwargs", False), tag("caller() if caller", False), tag("caller is defined", False)])
        call = random.choice([f"{name}()", f"{name}(1)", f"{name}(v=2)", f"{name}('p', 'q')", f"{name}(1, 2, 3)", f"{name}(zz=1)", f"{name}(*xs)", f"{name}(**e)"])
        use = tag(call, False) if random.random() < 0.7 else tag(f"call {call}") + statements(depth - 1) + tag("endcall")
        return tag(f"macro {name}({signature})") + body + tag("endmacro") + use
    if r < 0.94:
        return tag(random.choice(["filter upper", "filter trim", "filter indent(2)", "filter replace('x', s)", "filter e"])) + statements(depth - 1, in_loop) + tag("endfilter")
    if r < 0.96:
        return tag(f"with {random.choice(VARIABLES)} = {expression(1)}") + statements(depth - 1, in_loop) + tag("endwith")
    if r < 0.975:
        return tag("generation") + statements(depth - 1) + tag("endgeneration")
    if r < 0.985:
        return "{%" + random.choice(["", "-", "+"]) + " raw " + random.choice(["", "-"]) + "%}" + random.choice(["{{ x }}", "\n {% if %}\n", " a "]) + "{%" + random.choice(["", "-", "+"]) + " endraw " + random.choice(["", "-", "+"]) + "%}"
    return data()


def value(depth):
    r = random.random()
    if depth <= 0 or r < 0.4:
        return random.choice([random.choice(TEXTS), small_int(), None, True, False, random.choice([0.5, 2.0, -1.25, 1e22, 1e-9, 0.1, 100.0])])
    if r < 0.7:
        return [value(depth - 1) for _ in range(random.randint(0, 3))]
    return {random.choice(TEXTS + ["name", "role", "type", "x"]): value(depth - 1) for _ in range(random.randint(0, 3))}


def variables():
    messages = []
    for _ in range(random.randint(1, 4)):
        message = {"role": random.choice(["user", "assistant", "system", "tool"])}
        kind = random.random()
        if kind < 0.7:
            message["content"] = random.choice(TEXTS)
        elif kind < 0.8:
            message["content"] = None
        elif kind < 0.9:
            message["content"] = [{"type": "text", "text": random.choice(TEXTS)}, {"type": "image"}]
        if random.random() < 0.2:
            message["tool_calls"] = random.choice([[], None, [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": value(2)}}]])
        messages.append(message)
    return {
        "s": random.choice(TEXTS), "t": random.choice(TEXTS), "n": small_int(), "m": small_int(), "f": random.choice([0.0, 1.5, -2.25, 1e16, 1e15, 123.456]),
        "b": random.random() < 0.5, "z": 0, "xs": random.choice([[1, 2, 3], ["a", "B", "c"], [], [1, "a", None], [[1, 2], [3]], [3, 1, 2]]),
        "ys": random.choice([[0, 1, 1.0, True], ["b", "a", "A"], ["x"]]), "d": {"name": random.choice(TEXTS), "a b": random.choice(TEXTS), "k": small_int(), "items": 7},
        "e": {"x": 1, "y": 0, "Z": 5}, "none_value": None, "messages": messages, "tools": random.choice([None, [], [{"name": "f", "parameters": value(3)}]]),
        "empty": [], "nested": {"list": [{"children": [{"name": "p"}]}, {"children": []}], "deep": value(3)},
    }


def conversation():
    """Variables for a real template: mostly well-formed, with the oddities of real requests."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": random.choice(TEXTS)}, "n": value(2)},
              "required": random.choice([[], ["city"], None])}
    messages = []
    if random.random() < 0.4:
        messages.append({"role": random.choice(["system", "developer"]), "content": random.choice(TEXTS)})
    for _ in range(random.randint(0, 5)):
        content = random.choice([random.choice(TEXTS), random.choice(TEXTS), random.choice(TEXTS), None, "", [{"type": "text", "text": random.choice(TEXTS)}],
                                 [{"type": "image"}, {"type": "text", "text": random.choice(TEXTS)}], "<think>\nhm\n</think>\n\nso", []])
        messages.append({"role": "user", "content": content if random.random() < 0.4 else random.choice(TEXTS)})
        if random.random() < 0.3:
            call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": random.choice([value(3), {"city": random.choice(TEXTS)}, {}, "{}"])}}
            messages.append({"role": "assistant", "content": random.choice([None, "", "x"]), "tool_calls": random.choice([[call], [call, call], [], None])})
            messages.append({"role": "tool", "tool_call_id": "call12345", "name": "f", "content": random.choice([random.choice(TEXTS), json.dumps(value(2)), value(2)])})
        reply = {"role": "assistant", "content": content if random.random() < 0.3 else random.choice(TEXTS)}
        if random.random() < 0.2:
            reply[random.choice(["reasoning_content", "thinking"])] = random.choice(TEXTS)
        messages.append(reply)
    if random.random() < 0.8:
        messages.append({"role": "user", "content": random.choice(TEXTS)})
    result = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": random.random() < 0.7}
    if random.random() < 0.5:
        tool = {"type": "function", "function": {"name": "f", "description": random.choice(TEXTS), "parameters": random.choice([schema, schema, {}, value(3)])}}
        result["tools"] = random.choice([None, [], [tool], [tool, tool]])
    if random.random() < 0.2:
        result["enable_thinking"] = random.choice([True, False, None])
    if random.random() < 0.1:
        result["documents"] = random.choice([None, [], [{"title": "t", "text": random.choice(TEXTS)}]])
    return result


def sources(folder):
    """The templates in a folder: .jinja files and the chat_template of .json files."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.suffix == ".jinja":
            found[path.read_text(encoding="utf8")] = None
        elif path.suffix == ".json" and path.stat().st_size < 1 << 20:
            try:
                template = json.loads(path.read_text(encoding="utf8")).get("chat_template")
            except (ValueError, AttributeError):
                continue
            for text in [template] if isinstance(template, str) else [item["template"] for item in template or []]:
                found[text] = None
    return list(found)


def case(index):
    variant = random.random()
    if variant < 0.5:
        template = tag(expression(random.randint(1, 4)), False)
    else:
        template = "{% set ns = namespace(v=0) %}" + statements(random.randint(1, 4), count=random.randint(1, 5)) + data()
    return {"template": template, "vars": variables()}


ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")


def nondeterministic(result):
    text = result.get("rendered", result.get("error", ""))
    return bool(ADDRESS.search(text)) or "<generator object" in text or " object at " in text or "<built-in" in text or "<bound method" in text or "iterator object" in text


def encodable(case):
    try:
        json.dumps(case, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


def generate(arguments):
    random.seed(arguments.seed)
    size = 0
    with open(arguments.output, "w", encoding="utf8") as output:
        written = 0
        while written < arguments.count:
            c = case(written)
            r = render(c["template"], c["vars"])
            if not encodable(c) or not encodable(r) or nondeterministic(r) or len(c["template"]) > 240:
                continue
            used = {k: v for k, v in c["vars"].items() if re.search(rf"\b{k}\b", c["template"])}
            r = render(c["template"], used)
            line = json.dumps({"template": c["template"], "vars": used, **r}, ensure_ascii=False) + "\n"
            if len(line.encode()) > 600 or size + len(line.encode()) > arguments.bytes:
                if size > arguments.bytes - 2000:
                    break
                continue
            output.write(line)
            size += len(line.encode())
            written += 1
    print(written, "cases,", size, "bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("generate")
    command.add_argument("--output", required=True)
    command.add_argument("--bytes", type=int, default=140_000)
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    if jinja2.__version__ != "3.1.6":
        sys.exit("needs jinja2 3.1.6")
    generate(arguments)


if __name__ == "__main__":
    main()
