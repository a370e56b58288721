import ApusCore
import ApusTokenization
import Testing

/// Renders a template with variables written as JSON.
private func render(_ template: String, _ variables: JSONValue = [:]) throws -> String {
  var compiled = try ChatTemplate(source: template)
  compiled.clock = { .init(year: 2026, month: 1, day: 15, hour: 12) }
  return try compiled.render(try #require(variables.objectValue))
}

/// The failure of a template, as kind and message.
private func fault(_ template: String, _ variables: JSONValue = [:]) -> String? {
  do {
    _ = try ChatTemplate(source: template).renderFaulting(variables.objectValue ?? JSONObject())
    return nil
  } catch let error as TemplateFault {
    return "\(error)"
  } catch {
    return "\(error)"
  }
}

@Suite("The template language")
struct TemplateLanguageTests {
  @Test(
    "Expressions have Python's meaning",
    arguments: [
      ("{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 2 ** 10 }} {{ 7 / 2 }}", "3 -4 2 -2 1024 3.5"),
      (
        "{{ 1e16 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 100.0 }} {{ 1 == 1.0 }}", "1e+16 1e-05 0.30000000000000004 100.0 True"
      ),
      ("{{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 'a' in 'abc' }} {{ 2 not in [1, 2] }}", "True False True False"),
      ("{{ [1, 'a', none, true, 2.5, (1,), {'k': 'v'}] }}", "[1, 'a', None, True, 2.5, (1,), {'k': 'v'}]"),
      ("{{ 'abcdef'[::-2] }} {{ [1, 2, 3, 4][-3:-1] }} {{ 'h\u{E9}llo'[1] }}", "fdb [2, 3] \u{E9}"),
      ("{{ 'a' 'b' ~ 1 ~ none ~ true }}", "ab1NoneTrue"),
      ("{{ 'x' if false }}|{{ 'x' if false else 'y' }}|{{ missing }}|{{ missing is defined }}", "|y||False"),
      ("{{ '' or 'b' }} {{ 'a' and 'b' }} {{ not 0 }} {{ [] or {} }}", "b b True {}"),
      (
        "{{ 'a,b,,c'.split(',', 1) }} {{ ' a  b '.split() }} {{ 'x=y=z'.rsplit('=', 1) }}",
        "['a', 'b,,c'] ['a', 'b'] ['x=y', 'z']"
      ),
      ("{{ ' a  b '.split(none, 1) }}{{ ' a b '.rsplit(none, 1) }}", "['a', 'b '][' a', 'b']"),
      ("{{ '%05.1f|%-4s|%x' % (3.14159, 'a', 255) }} {{ '{0:>5}{n!r}'.format('a', n='b') }}", "003.1|a   |ff     a'b'"),
      ("{{ {'items': 5}['items'] }} {{ {'a': 5}.a }} {{ {'a': 5}.get('b', 7) }}", "5 5 7"),
      ("{{ 5 is divisibleby 5 }} {{ 'a' is in ['a'] }} {{ 3 is not odd }} {{ none is none }}", "True True False True"),
    ])
  func expressions(template: String, expected: String) throws {
    #expect(try render(template) == expected)
  }

  @Test(
    "Filters",
    arguments: [
      ("{{ [3, 1, 2] | sort | join('-') }} {{ ['b', 'A'] | sort }} {{ [1, 2, 3] | sum }}", "1-2-3 ['A', 'b'] 6"),
      ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }} {{ [0, 1, 2] | select | list }}", "[1, 2] [1, 2]"),
      (
        "{{ {'b': 1, 'A': 2} | dictsort }} {{ 'a b' | title }} {{ 3.7 | int }} {{ 2.5 | round }}",
        "[('A', 2), ('b', 1)] A B 3 2.0"
      ),
      ("{{ 'a\nb\n\nc' | indent(2) }}", "a\n  b\n\n  c"),
      ("{{ {'\u{E9}': '<b>', 'n': [1, 2.0, none]} | tojson }}", "{\"\u{E9}\": \"<b>\", \"n\": [1, 2.0, null]}"),
      ("{{ {'b': 1, 'a': []} | tojson(indent=2, sort_keys=true) }}", "{\n  \"a\": [],\n  \"b\": 1\n}"),
      (
        "{{ '<a>' | e }} {{ '<b>' | safe + '<' }} {{ missing | default('d') }} {{ '' | d('e', true) }}",
        "&lt;a&gt; <b>&lt; d e"
      ),
      (
        "{{ range(5) | batch(2) | list }} {{ [1, 1, 2] | unique | list }} {{ 'ab' | list }}",
        "[[0, 1], [2, 3], [4]] [1, 2] ['a', 'b']"
      ),
    ])
  func filters(template: String, expected: String) throws {
    #expect(try render(template) == expected)
  }

  @Test("Blocks and comments take a newline and their indentation with them; variables do not")
  func whiteSpace() throws {
    #expect(try render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n") == "a\n  b\nc")
    #expect(try render("a\n  {%+ if true %}b{% endif +%}\nc") == "a\n  b\nc")
    #expect(try render("a {%- if true -%} b {%- endif -%} c") == "abc")
    #expect(try render("  {# note #}\nx {{- 1 -}} \n y") == "x1y")
    #expect(try render("{% raw %}{{ x }}{% endraw %}\n{{ 1 }}\n\n") == "{{ x }}1\n")
    #expect(try render("x\r\ny\r{{ 1 }}") == "x\ny\n1")
  }

  @Test("Assignments belong to their scope; namespaces reach out of it")
  func scopes() throws {
    #expect(try render("{% set x = 1 %}{% for i in [2, 3] %}{% set x = i %}{{ x }}{% endfor %}{{ x }}") == "231")
    #expect(try render("{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}") == "2")
    #expect(
      try render("{% set n = namespace(x=1) %}{% for i in [2, 3] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}") == "6"
    )
    #expect(try render("{% set a, b = 1, [2, 3] %}{{ a }}{{ b[1] }}{% set t %}<{{ a }}>{% endset %}{{ t }}") == "13<1>")
    #expect(try render("{% with x = 5 %}{{ x }}{% endwith %}{{ x }}") == "5")
    #expect(try render("{% macro f() %}{{ x }}{% endmacro %}{% set x = 4 %}{{ f() }}") == "4")
  }

  @Test("Loops")
  func loops() throws {
    #expect(
      try render(
        "{% for x in 'abc' %}{{ loop.index }}{{ loop.revindex0 }}{{ x }}{{ ',' if not loop.last }}{% endfor %}")
        == "12a,21b,30c")
    #expect(try render("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}") == "a1")
    #expect(try render("{% for x in [] %}{% else %}none{% endfor %}") == "none")
    #expect(try render("{% for x in range(9) if x is odd %}{{ x }}{{ loop.length }}{% endfor %}") == "14345474")
    #expect(
      try render(
        "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% elif x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}"
      )
        == "02")
    #expect(
      try render(
        "{% for x in t recursive %}{{ x.n }}{% if x.c %}({{ loop(x.c) }}){% endif %}{{ loop.depth }}{% endfor %}",
        ["t": [["n": 1, "c": [["n": 2]]]]]) == "1(22)1")
    #expect(
      try render("{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{{ loop.cycle('a', 'b') }}{% endfor %}")
        == "TrueaFalsebTruea")
    #expect(try render("{% for x in [1, 2] %}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}") == "2;1;")
  }

  @Test("Macros, call blocks and filter blocks")
  func macros() throws {
    #expect(
      try render("{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 3, 4, z=5) }}")
        == "13(4,){'z': 5}")
    #expect(
      try render("{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}!{% endcall %}") == "<1!>")
    #expect(try render("{% filter upper %}a{{ 'b' }}{% endfilter %}{% generation %}c{% endgeneration %}") == "ABc")
  }

  @Test("Functions of the environment")
  func functions() throws {
    #expect(try render("{{ strftime_now('%d %b %Y %H:%M') }}") == "15 Jan 2026 12:00")
    #expect(
      try render("{{ dict(a=1).a }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.next() }}") == "1121")
    #expect(try render("{% set j = joiner('|') %}{{ j() }}a{{ j() }}b") == "a|b")
    #expect(fault("{{ raise_exception('No ' ~ 1) }}") == "TemplateError: No 1")
    #expect(throws: EngineError(.invalidRequest, "Sorry", parameter: "messages")) {
      try render("{{ raise_exception('Sorry') }}")
    }
  }

  @Test(
    "Failures are worded as the reference words them",
    arguments: [
      ("{{ missing.x }}", "UndefinedError: 'missing' is undefined"),
      ("{{ {}.x.y }}", "UndefinedError: 'dict object' has no attribute 'x'"),
      ("{{ 'a' + 1 }}", "TypeError: can only concatenate str (not \"int\") to str"),
      ("{{ [].append(1) }}", "SecurityError: access to attribute 'append' of 'list' object is unsafe."),
      ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
      ("{{ 1 < 'a' }}", "TypeError: '<' not supported between instances of 'int' and 'str'"),
      ("{{ none | tojson | length + none }}", "TypeError: unsupported operand type(s) for +: 'int' and 'NoneType'"),
      ("{% set x.y = 1 %}", "TemplateRuntimeError: cannot assign attribute on non-namespace object"),
      (
        "{{ 9223372036854775807 + 1 }}",
        "Unsupported: An integer of the template needs more than 64 bits, which is not supported"
      ),
    ])
  func failures(template: String, expected: String) {
    #expect(fault(template) == expected)
  }

  @Test(
    "Mistakes in a template are found when it is compiled, with their line",
    arguments: [
      ("\n{% if x %}", "line 2"), ("{{ 1 + }}", "unexpected 'end of print statement'"),
      ("{% foo %}", "unknown tag 'foo'"), ("{{ x | nope }}", "No filter named 'nope'"), ("{{ 'a }}", "unexpected char"),
      ("{# a", "Missing end of comment tag"), ("{% raw %}a", "Missing end of raw directive"),
      ("{{ (1 }}", "unexpected '}', expected ')'"), ("{% break %}", "'break' outside loop"),
    ])
  func mistakes(template: String, part: String) {
    let error = #expect(throws: EngineError.self) { try ChatTemplate(source: template) }
    #expect(error?.code == .invalidCheckpoint)
    #expect(error?.message.contains(part) == true, "\(error?.message ?? "")")
  }

  @Test(
    "What is refused says so",
    arguments: ["{% include 'x' %}", "{% extends 'x' %}", "{% autoescape true %}{% endautoescape %}"])
  func refusals(template: String) {
    let error = #expect(throws: EngineError.self) { try ChatTemplate(source: template) }
    #expect(error?.code == .unsupported)
  }

  @Test(
    "A hostile template ends with an error",
    arguments: [
      "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
      "{{ 'a' * 9999999999 }}", "{{ [0] * 999999999999 }}", "{{ 'x' | center(99999999999) }}",
      "{{ '%999999999d' % 1 }}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
      "{{ '{:>99999999999}'.format(1) }}", "{{ ('a' * 60000).replace('a', 'b' * 60000) }}",
      "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 1000 }}{% endfor %}",
      "{{ x | tojson(indent=99999999999) }}", "{{ range(99999999999) }}", "{{ 2 ** 99999999999 }}",
    ])
  func hostile(template: String) {
    #expect(throws: EngineError.self) { try render(template, ["x": [1]]) }
  }

  @Test("Deep nesting is refused, not followed")
  func nesting() {
    for (open, close) in [("(", ")"), ("[", "]"), ("-", ""), ("not ", ""), ("x|f(", ")")] {
      let template = "{{ " + String(repeating: open, count: 5000) + "1" + String(repeating: close, count: 5000) + " }}"
      #expect(throws: EngineError.self) { try ChatTemplate(source: template) }
    }
    let blocks = String(repeating: "{% if a %}", count: 5000) + String(repeating: "{% endif %}", count: 5000)
    #expect(throws: EngineError.self) { try ChatTemplate(source: blocks) }
  }

  @Test("Random texts and pieces of templates never crash the compiler")
  func fuzz() {
    let seed: UInt64 = 0x5EED_0007
    var state = seed
    func next(_ bound: Int) -> Int {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Int((state >> 33) % UInt64(bound))
    }
    let pieces = [
      "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", " if ", " for x in y ", " else ", "endif", "endfor", "'", "\"",
      "\\", "a",
      "1", ".5", "e9", "(", ")", "[", "]", "{", "}", "|", ":", ",", "~", " is ", " not ", " in ", "\n", "é", "😀",
      "set x =",
      "macro f(a=", "call", "filter upper", "raw", "endraw", "loop", "**", "//", "%", "\\x4", "\\u00e9", "caller",
      "\u{0}",
    ]
    for _ in 0..<3000 {
      let template = (0..<(1 + next(14))).map { _ in pieces[next(pieces.count)] }.joined()
      var limited = try? ChatTemplate(source: template)
      limited?.limits.steps = 10_000
      _ = try? limited?.render(JSONObject([("y", [1, 2]), ("x", "s")]))
    }
    #expect(state != seed)
  }
}
