/// Counts which experts of a mixture tokens are sent to, between a start and a stop. A `GenerationService` offers one through
/// `expertLoads`.
public protocol ExpertLoadService: Sendable {
  /// Whether passes are being recorded.
  var isRecording: Bool { get }
  /// How evenly what was recorded is spread over the places of experts' weights: the mean over layers of (mean tokens of a
  /// place) / (tokens of the busiest place), in (0, 1]; `nil` before anything is recorded.
  var balancedness: Double? { get }
  /// Forgets what was recorded and records from the next pass on.
  func start()
  /// Keeps what was recorded and records no more.
  func stop()
  /// What was recorded, as an object, and forgets it. Recording goes on if it was on.
  func dump() -> JSONValue
}

extension GenerationService {
  public var expertLoads: (any ExpertLoadService)? { nil }
}
