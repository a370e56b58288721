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
