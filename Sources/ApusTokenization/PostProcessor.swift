import ApusCore

/// What is put around the ids of a text: the `single` form of a post-processor, reduced to ids.
struct PostProcessor: Sendable, Equatable {
  var prefix: [TokenID] = []
  var suffix: [TokenID] = []
  /// How often the text itself stands between them; a template may leave it out or repeat it.
  var repetitions: [[TokenID]] = []

  static let none = PostProcessor()

  /// Writes the ids of a text with its surroundings.
  func apply(to ids: inout [TokenID]) {
    if prefix.isEmpty, suffix.isEmpty, repetitions.isEmpty { return }
    var result = prefix
    result.reserveCapacity(prefix.count + ids.count + suffix.count)
    result.append(contentsOf: ids)
    for between in repetitions {
      result.append(contentsOf: between)
      result.append(contentsOf: ids)
    }
    result.append(contentsOf: suffix)
    ids = result
  }
}
