public import ApusCore
import Synchronization

/// Counts which experts tokens are sent to, between a start and a stop.
///
/// The thread that runs the model records; others start, stop and dump. While nothing is recorded a pass costs one look at a
/// flag for each layer and allocates nothing.
public final class ExpertLoadRecorder: ExpertLoadService {
  /// How much is kept.
  public enum Mode: String, Sendable, CaseIterable {
    /// The sums over all passes.
    case stat
    /// The counts of each pass.
    case perPass = "per_pass"
    /// The tokens of each pass, their positions and each one's experts.
    case perToken = "per_token"
  }

  /// What a pass left.
  private struct Pass {
    var number: Int
    /// [layer * slots + slot], for `per_pass`.
    var counts: [Int32] = []
    /// For `per_token`.
    var tokens: [TokenID] = []
    var positions: [Int32] = []
    /// [layer]: [token * experts per token], as the router numbers them.
    var chosen: [[Int32]] = []
  }

  private struct Storage {
    /// [layer * slots + slot], over all passes since the start.
    var totals: [Int]
    var passes: [Pass] = []
    /// Where the oldest pass is once there is no more room.
    var oldest = 0
    var passCount = 0
    var tokenCount = 0
  }

  public let mode: Mode
  /// Passes that are kept by modes other than `stat`; older ones go.
  public let bufferSize: Int
  private let layerCount: Int
  private let expertCount: Int
  private let expertsPerToken: Int
  private let slotCount: Int
  /// [layer][slot]: the expert of each.
  private let expertOfSlot: [[Int]]
  private let flag = Atomic<Bool>(false)
  private let storage: Mutex<Storage>

  /// Prepares to record.
  /// - Throws: `invalidRequest` if the model has no experts.
  public init(
    _ configuration: ModelConfiguration, location: ExpertLocation? = nil, mode: Mode, bufferSize: Int = 1000
  ) throws(EngineError) {
    guard let experts = configuration.experts else {
      throw EngineError(
        .invalidRequest, "The loads of experts cannot be recorded: \(configuration.architecture) has none here.",
        parameter: "expert_distribution_recorder_mode")
    }
    self.mode = mode
    self.bufferSize = max(1, bufferSize)
    layerCount = configuration.layerCount
    expertCount = experts.expertCount
    expertsPerToken = experts.expertsPerToken
    slotCount = location?.slotCount ?? experts.expertCount
    expertOfSlot = (0..<configuration.layerCount).map {
      ExpertMap(location, layer: $0, expertCount: experts.expertCount).expertOfSlot
    }
    storage = Mutex(Storage(totals: Array(repeating: 0, count: layerCount * slotCount)))
  }

  /// Whether passes are being recorded.
  public var isRecording: Bool { flag.load(ordering: .relaxed) }

  /// Forgets what was recorded and records from the next pass on.
  public func start() {
    storage.withLock { reset(&$0) }
    flag.store(true, ordering: .relaxed)
  }

  /// Keeps what was recorded and records no more.
  public func stop() { flag.store(false, ordering: .relaxed) }

  private func reset(_ storage: inout Storage) {
    storage = Storage(totals: Array(repeating: 0, count: layerCount * slotCount))
  }

  // MARK: The model's thread

  /// Begins a pass.
  func begin(_ batch: ForwardBatch) {
    guard isRecording else { return }
    storage.withLock { storage in
      storage.passCount += 1
      storage.tokenCount += batch.rowCount
      if mode == .stat { return }
      var pass = Pass(number: storage.passCount)
      if mode == .perPass {
        pass.counts = Array(repeating: 0, count: layerCount * slotCount)
      } else {
        pass.tokens = Array(UnsafeBufferPointer(start: batch.tokens, count: batch.rowCount))
        pass.positions = Array(UnsafeBufferPointer(start: batch.positions, count: batch.rowCount))
        pass.chosen = Array(repeating: [], count: layerCount)
      }
      if storage.passes.count < bufferSize {
        storage.passes.append(pass)
      } else {
        storage.passes[storage.oldest] = pass
        storage.oldest = (storage.oldest + 1) % bufferSize
      }
    }
  }

  /// Records a layer's choices, which have their places.
  func record(layer: Int, _ activations: ExpertActivations) {
    guard isRecording, layer < layerCount else { return }
    storage.withLock { storage in
      // Recording began in the middle of a pass: the rest of it does not count.
      guard storage.passCount > 0 else { return }
      let first = layer * slotCount
      for slot in 0..<slotCount { storage.totals[first + slot] += Int(activations.counts[slot]) }
      if mode == .stat { return }
      let newest =
        storage.passes.count < bufferSize ? storage.passes.count - 1 : (storage.oldest + bufferSize - 1) % bufferSize
      if mode == .perPass {
        for slot in 0..<slotCount { storage.passes[newest].counts[first + slot] += activations.counts[slot] }
      } else {
        storage.passes[newest].chosen[layer] += UnsafeBufferPointer(
          start: activations.chosen, count: activations.choiceCount)
      }
    }
  }

  // MARK: Reports

  /// [layer][expert]: how many tokens each expert got since recording began. Layers without experts have zeros.
  public var logicalCounts: [[Int]] {
    let totals = storage.withLock { $0.totals }
    return (0..<layerCount).map { logical(totals, layer: $0) }
  }

  private func logical(_ totals: [Int], layer: Int) -> [Int] {
    var counts = Array(repeating: 0, count: expertCount)
    for slot in 0..<slotCount { counts[expertOfSlot[layer][slot]] += totals[layer * slotCount + slot] }
    return counts
  }

  /// How evenly the recorded tokens are spread: the mean over layers of (mean tokens of a rank) / (tokens of the busiest
  /// rank), where `ranks` ranks share the slots, neighbours together; from 1 / `ranks` to 1. `nil` before anything is
  /// recorded, and where the slots cannot be shared equally.
  public func balancedness(ranks: Int) -> Double? {
    guard ranks >= 1, slotCount % ranks == 0 else { return nil }
    let totals = storage.withLock { $0.totals }
    var sum = 0.0
    var layers = 0
    let share = slotCount / ranks
    for layer in 0..<layerCount {
      let loads = (0..<ranks).map { rank in
        totals[layer * slotCount + rank * share..<layer * slotCount + (rank + 1) * share].reduce(0, +)
      }
      guard let most = loads.max(), most > 0 else { continue }
      sum += Double(loads.reduce(0, +)) / Double(ranks) / Double(most)
      layers += 1
    }
    return layers == 0 ? nil : sum / Double(layers)
  }

  /// Taken as if each slot were a rank.
  public var balancedness: Double? { balancedness(ranks: slotCount) }

  /// What was recorded, as JSON, and forgets it. Recording goes on if it was on.
  public func dump() -> JSONValue {
    let recorded = storage.withLock { storage in
      let recorded = storage
      reset(&storage)
      return recorded
    }
    func integers(_ list: some Sequence<Int>) -> JSONValue { .array(list.map { .int(Int64($0)) }) }
    var members: [(String, JSONValue)] = [
      ("mode", .string(mode.rawValue)), ("rank", 0), ("pass_count", .int(Int64(recorded.passCount))),
      ("token_count", .int(Int64(recorded.tokenCount))), ("experts_per_token", .int(Int64(expertsPerToken))),
      ("physical_to_logical_map", .array(expertOfSlot.map { integers($0) })),
      ("logical_count", .array((0..<layerCount).map { integers(logical(recorded.totals, layer: $0)) })),
      (
        "physical_count",
        .array(
          (0..<layerCount).map { integers(recorded.totals[$0 * slotCount..<($0 + 1) * slotCount]) })
      ),
    ]
    if mode != .stat {
      let ordered = recorded.passes[recorded.oldest...] + recorded.passes[..<recorded.oldest]
      members.append(
        (
          "records",
          .array(
            ordered.map { pass in
              var record: [(String, JSONValue)] = [("forward_pass_id", .int(Int64(pass.number)))]
              if mode == .perPass {
                record.append(
                  (
                    "physical_count",
                    .array(
                      (0..<layerCount).map {
                        integers(pass.counts[$0 * slotCount..<($0 + 1) * slotCount].lazy.map(Int.init))
                      })
                  ))
              } else {
                record.append(("input_ids", integers(pass.tokens.lazy.map(Int.init))))
                record.append(("positions", integers(pass.positions.lazy.map(Int.init))))
                record.append(
                  (
                    "topk_ids_of_layer",
                    .array(
                      pass.chosen.map { chosen in
                        .array(
                          stride(from: 0, to: chosen.count, by: expertsPerToken).map {
                            integers(chosen[$0..<$0 + expertsPerToken].lazy.map(Int.init))
                          })
                      })
                  ))
              }
              return .object(JSONObject(record))
            })
        ))
    }
    return .object(JSONObject(members))
  }
}
