import ApusCore

/// What is put around the ids of a text or of a pair of texts: the templates of a post-processor, reduced to ids.
struct PostProcessor: Sendable, Equatable {
  /// One part of a template.
  enum Part: Sendable, Equatable {
    case token(TokenID, type: Int32)
    case first(type: Int32)
    case second(type: Int32)
  }

  var single: [Part]
  var pair: [Part]

  /// Adds nothing.
  static let none = PostProcessor(single: [.first(type: 0)], pair: [.first(type: 0), .second(type: 1)])

  /// Puts single tokens around a text.
  static func around(prefix: [TokenID] = [], suffix: [TokenID] = []) -> PostProcessor {
    let before = prefix.map { Part.token($0, type: 0) }
    let after = suffix.map { Part.token($0, type: 0) }
    return PostProcessor(
      single: before + [.first(type: 0)] + after,
      pair: before + [.first(type: 0)] + after + prefix.map { .token($0, type: 1) } + [.second(type: 1)]
        + suffix.map { .token($0, type: 1) })
  }

  /// The token a text starts with, if one is added.
  var leadingToken: TokenID? { if case .token(let id, _)? = single.first { id } else { nil } }
  /// The token a text ends with, if one is added.
  var trailingToken: TokenID? { if case .token(let id, _)? = single.last { id } else { nil } }

  /// Writes the ids of a text with its surroundings.
  func apply(to ids: inout [TokenID]) {
    if single.count == 1, case .first = single[0] { return }
    var result: [TokenID] = []
    result.reserveCapacity(ids.count + single.count)
    for part in single {
      switch part {
      case .token(let id, _): result.append(id)
      case .first: result.append(contentsOf: ids)
      case .second: break
      }
    }
    ids = result
  }

  /// The ids of two texts with their surroundings, and the segment that each belongs to.
  func apply(to first: [TokenID], _ second: [TokenID]) -> (ids: [TokenID], types: [Int32]) {
    var ids: [TokenID] = []
    var types: [Int32] = []
    for part in pair {
      let part: ([TokenID], Int32) =
        switch part {
        case .token(let id, let type): ([id], type)
        case .first(let type): (first, type)
        case .second(let type): (second, type)
        }
      ids += part.0
      types += repeatElement(part.1, count: part.0.count)
    }
    return (ids, types)
  }

  /// The effect of another post-processor on the result of this one, which is what the other takes for the text.
  func followed(by next: PostProcessor) -> PostProcessor {
    func substitute(_ parts: [Part], _ inner: [Part]) -> [Part] {
      parts.flatMap { part -> [Part] in
        switch part {
        case .token: [part]
        case .first: inner
        case .second: [part]
        }
      }
    }
    // A pair reaches the next step as two texts, each already surrounded.
    guard next != .none else { return self }
    guard self != .none else { return next }
    return PostProcessor(single: substitute(next.single, single), pair: substitute(next.pair, single))
  }
}
