public import ApusCore

/// Where the weights of a model's experts lie: in slots, several of which may hold the same expert (replicas). Routers know
/// experts, dispatchers slots.
public struct ExpertLocation: Sendable, Equatable {
  /// [layer][slot]: the expert that lies there. Layers beyond the last have each expert at its own number.
  public let expertOfSlot: [[Int]]

  /// Describes places.
  /// - Throws: `invalidRequest` where a layer has no place for an expert, or layers have different numbers of slots.
  public init(expertOfSlot: [[Int]], expertCount: Int) throws(EngineError) {
    for (layer, slots) in expertOfSlot.enumerated() {
      guard slots.count == expertOfSlot[0].count else {
        throw EngineError(
          .invalidRequest,
          "Expert location: layer \(layer) has \(slots.count) slots, but layer 0 has \(expertOfSlot[0].count).")
      }
      if let expert = slots.first(where: { $0 < 0 || $0 >= expertCount }) {
        throw EngineError(
          .invalidRequest, "Expert location: layer \(layer) names expert \(expert), but there are \(expertCount).")
      }
      let held = Set(slots)
      if let missing = (0..<expertCount).first(where: { !held.contains($0) }) {
        throw EngineError(.invalidRequest, "Expert location: layer \(layer) has no slot for expert \(missing).")
      }
    }
    self.expertOfSlot = expertOfSlot
  }

  /// Each expert at its own number, then replicas of the first ones, as SGLang's `trivial` has it.
  public static func trivial(layerCount: Int, expertCount: Int, redundant: Int) throws(EngineError) -> ExpertLocation {
    let slots = (0..<expertCount + redundant).map { $0 % expertCount }
    return try ExpertLocation(expertOfSlot: Array(repeating: slots, count: layerCount), expertCount: expertCount)
  }

  /// Each expert at its own number, then replicas of those with the most tokens for each of their slots, one after the other.
  /// - Parameter counts: [layer][expert]: tokens.
  /// - Throws: `invalidRequest` where there is not one count for each expert.
  public static func balanced(
    counts: [[Int]], expertCount: Int, redundant: Int
  ) throws(EngineError) -> ExpertLocation {
    var slots: [[Int]] = []
    for (layer, counts) in counts.enumerated() {
      guard counts.count == expertCount, counts.allSatisfy({ $0 >= 0 }) else {
        throw EngineError(
          .invalidRequest,
          "Expert location: layer \(layer) has \(counts.count) counts, but there are \(expertCount) experts.")
      }
      var own = Array(0..<expertCount)
      var replicas = Array(repeating: 1, count: expertCount)
      for _ in 0..<redundant {
        // Ties go to the smaller number.
        var busiest = 0
        for expert in 1..<expertCount
        where Double(counts[expert]) / Double(replicas[expert]) > Double(counts[busiest]) / Double(replicas[busiest]) {
          busiest = expert
        }
        own.append(busiest)
        replicas[busiest] += 1
      }
      slots.append(own)
    }
    return try ExpertLocation(expertOfSlot: slots, expertCount: expertCount)
  }

  /// What a file says: `physical_to_logical_map` ([layer][slot], the expert of each), or `logical_count` ([layer][expert],
  /// tokens), as a dump of the recorder of loads has it. Of a dump, which has both, the counts are taken.
  /// - Throws: `invalidRequest` with the file and the reason.
  public static func read(
    _ path: String, layerCount: Int, expertCount: Int, redundant: Int
  ) throws(EngineError) -> ExpertLocation {
    func refuse(_ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "Expert location: \(path) \(sentence).", parameter: "init_expert_location")
    }
    guard let bytes = try readSmallFile(path) else { throw refuse("does not exist") }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch { throw refuse("is not JSON: \(error)") }
    func table(_ key: String) throws(EngineError) -> [[Int]]? {
      guard let value = json[key] else { return nil }
      var layers: [[Int]] = []
      for layer in value.arrayValue ?? [] {
        let numbers = (layer.arrayValue ?? []).compactMap(\.intValue)
        guard !numbers.isEmpty, numbers.count == layer.arrayValue?.count else {
          throw refuse("has no list of integers for layer \(layers.count) of \(key)")
        }
        layers.append(numbers)
      }
      guard layers.count == layerCount else {
        throw refuse("has \(layers.count) layers in \(key), but the model has \(layerCount)")
      }
      return layers
    }
    if let counts = try table("logical_count") {
      return try balanced(counts: counts, expertCount: expertCount, redundant: redundant)
    }
    guard let slots = try table("physical_to_logical_map") else {
      throw refuse("has neither physical_to_logical_map nor logical_count")
    }
    guard slots[0].count == expertCount + redundant else {
      throw refuse(
        "has \(slots[0].count) slots in each layer, but there are \(expertCount) experts and \(redundant) redundant ones"
      )
    }
    return try ExpertLocation(expertOfSlot: slots, expertCount: expertCount)
  }

  /// Slots of each layer.
  public var slotCount: Int? { expertOfSlot.first?.count }
}

/// The slots of one layer.
final class ExpertMap: @unchecked Sendable {
  // Unchecked: written once, before anyone else sees it.

  let expertCount: Int
  /// [slots]: the expert of each.
  let expertOfSlot: [Int]
  /// [experts + 1]: where each expert's slots begin in `slots`.
  private let starts: UnsafeMutablePointer<Int32>
  private let slots: UnsafeMutablePointer<Int32>

  /// The slots of a layer; each expert at its own number where nothing else is said.
  init(_ location: ExpertLocation?, layer: Int, expertCount: Int) {
    self.expertCount = expertCount
    if let location, layer < location.expertOfSlot.count {
      expertOfSlot = location.expertOfSlot[layer]
    } else {
      // Slots without a use repeat the experts, so that all layers have equally many.
      expertOfSlot = (0..<(location?.slotCount ?? expertCount)).map { $0 % expertCount }
    }
    starts = .allocate(capacity: expertCount + 1)
    slots = .allocate(capacity: expertOfSlot.count)
    var count = 0
    for expert in 0..<expertCount {
      starts[expert] = Int32(count)
      for (slot, held) in expertOfSlot.enumerated() where held == expert {
        slots[count] = Int32(slot)
        count += 1
      }
    }
    starts[expertCount] = Int32(count)
  }

  deinit {
    starts.deallocate()
    slots.deallocate()
  }

  /// The slot in which a row's expert is computed: rows take an expert's replicas in turns. All replicas give the same bits.
  @inline(__always)
  func slot(expert: Int32, row: Int) -> Int32 {
    let first = starts[Int(expert)]
    let count = starts[Int(expert) + 1] - first
    return count == 1 ? slots[Int(first)] : slots[Int(first) + row % Int(count)]
  }
}
