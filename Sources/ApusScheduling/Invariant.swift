/// Stops the process, with a sentence, if the scheduler's own books are wrong. `precondition` keeps its sentence to
/// itself in release builds, and a broken invariant in production is what the sentence is for.
@inline(__always)
func invariant(
  _ holds: Bool, _ sentence: @autoclosure () -> String, file: StaticString = #fileID, line: UInt = #line
) {
  if !holds { violated(sentence(), file: file, line: line) }
}

@inline(never)
private func violated(_ sentence: String, file: StaticString, line: UInt) -> Never {
  fatalError(sentence, file: file, line: line)
}
