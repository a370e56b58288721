internal import ApusCore
internal import CKernels

/// Packed weights as pieces of memory, so that they can be kept in a file and had back without packing.
extension CPUBackend {
  /// What identifies how packed weights lie in memory, and the instructions that rounded them: weights are only to be had
  /// back where both are the same.
  public var packedLayoutName: String { "layout \(APUS_PACKED_LAYOUT), \(instructionSet.name)" }

  /// The pieces of memory that a packed weight is made of, which live as long as the weight; `nil` for a weight of another
  /// backend and for joined ones.
  public func regions(of weight: any LinearWeight) -> [UnsafeRawBufferPointer]? {
    guard let weight = weight as? CPULinearWeight else { return nil }
    return withUnsafeTemporaryAllocation(of: apus_region.self, capacity: Int(APUS_REGIONS)) { list in
      let count = Int(apus_linear_regions(weight.packed, list.baseAddress))
      return list[..<count].map { UnsafeRawBufferPointer(start: $0.address, count: $0.bytes) }
    }
  }

  /// A packed weight over memory that holds what `regions(of:)` gave for an equal weight.
  ///
  /// - Parameters:
  ///   - regions: the pieces, each at an address that is a multiple of 64. They are only read.
  ///   - owner: keeps the memory alive.
  /// - Returns: `nil` if the pieces cannot be those of such a weight.
  public func linear(
    outputs: Int, inputs: Int, format: WeightFormat, regions: [UnsafeRawBufferPointer], owner: AnyObject
  ) -> (any LinearWeight)? {
    guard regions.count <= Int(APUS_REGIONS),
      regions.allSatisfy({ Int(bitPattern: $0.baseAddress) % 64 == 0 })
    else { return nil }
    let pieces = regions.map {
      apus_region(address: UnsafeMutableRawPointer(mutating: $0.baseAddress), bytes: $0.count)
    }
    let count = Int32(pieces.count)
    let view: OpaquePointer?
    switch format {
    case .dense(let dtype):
      guard let kernel = try? dtype.kernel() else { return nil }
      view = apus_linear_view(Int64(outputs), Int64(inputs), kernel, pieces, count)
    case .int8PerChannel:
      view = apus_linear_view(Int64(outputs), Int64(inputs), APUS_INT8, pieces, count)
    case .codes(let layout):
      guard var kernel = try? layout.kernel() else { return nil }
      view = apus_linear_view_codes(Int64(outputs), Int64(inputs), &kernel, pieces, count)
    }
    guard let view else { return nil }
    return CPULinearWeight(packed: view, outputs: outputs, inputs: inputs, format: format, owner: owner)
  }

  /// A checksum of memory, computed on all threads: against damage, not against attackers.
  public func checksum(_ bytes: UnsafeRawBufferPointer) -> UInt64 {
    locked { apus_checksum($0, bytes.baseAddress, bytes.count) }
  }
}
