import ApusCore
import ApusGrammar
import Testing

@Suite("Grammar expressions")
struct GrammarExpressionTests {
  @Test("Rules can refer to rules that are defined later")
  func rules() {
    var grammar = Grammar()
    let list = grammar.addRule("list")
    grammar.define(list, .choice([.empty, .sequence([.text("a"), .rule(list)])]))
    grammar.root = .rule(list)
    #expect(grammar.rules[list.index].body != .never)
  }
}
