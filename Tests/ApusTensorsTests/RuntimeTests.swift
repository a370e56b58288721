import ApusCore
import ApusTensors
import CLinux
import Glibc
import Synchronization
import Testing

@Suite struct ThreadPoolTests {
  @Test(arguments: threadCounts)
  func everyChunkRunsOnce(threads: Int) throws {
    let backend = try makeBackend(.portable, threads: threads)
    let counts = (0..<1000).map { _ in Counter() }
    for round in 1...200 {
      let chunks = [1, 2, 3, 17, 1000][round % 5]
      backend.parallel(chunks: chunks) { counts[$0].value.add(1, ordering: .relaxed) }
    }
    // Of 200 rounds, 40 each had 1, 2, 3, 17 and 1000 chunks.
    #expect(
      counts.map { $0.value.load(ordering: .relaxed) }
        == (0..<1000).map { i in
          40 * [1, 2, 3, 17, 1000].count { i < $0 }
        })
  }

  @Test func aRegionEndsAfterAllItsChunks() throws {
    // Workers sleep between rounds now and then, so that both ways of waiting are used.
    let backend = try makeBackend(.portable, threads: 3)
    var total = 0
    for round in 0..<300 {
      let sum = Counter()
      backend.parallel(chunks: 7) { chunk in
        var x = UInt64(chunk)
        for _ in 0..<(round % 10 == 0 ? 40_000 : 50) { x = x &* 6_364_136_223_846_793_005 &+ 1 }
        sum.value.add(x == 0 ? 2 : 1, ordering: .relaxed)
      }
      total += sum.value.load(ordering: .relaxed)
    }
    #expect(total == 300 * 7)
  }

  @Test func callsFromSeveralThreadsWaitForEachOther() async throws {
    let backend = try makeBackend(.best, threads: 2)
    let sums = await withTaskGroup(of: Int.self) { group in
      for _ in 0..<4 {
        group.addTask {
          (0..<200).reduce(0) { total, _ in
            let sum = Counter()
            backend.parallel(chunks: 5) { sum.value.add($0, ordering: .relaxed) }
            return total + sum.value.load(ordering: .relaxed)
          }
        }
      }
      return await group.reduce(into: [Int]()) { $0.append($1) }
    }
    #expect(sums == [2000, 2000, 2000, 2000])
  }

  @Test func scratchMemoryStopsGrowing() throws {
    let backend = try makeBackend(.best)
    var generator = Generator(51)
    let weight = try pack(
      backend, generator.floats(100 * 100), outputs: 100, inputs: 100, source: .float32, format: .dense(.bfloat16))
    let x = try tensor(generator.floats(50 * 100), rows: 50, columns: 100)
    let out = try backend.allocate(rows: 50, columns: 100, dtype: .float32)
    backend.linear(x, weight, bias: nil, out: out)
    let held = backend.scratchByteCount
    #expect(held > 0)
    for rows in 1...50 { backend.linear(x.prefix(rows: rows), weight, bias: nil, out: out.prefix(rows: rows)) }
    #expect(backend.scratchByteCount == held)
  }

  @Test func namesAndLevels() throws {
    #expect(try CPUBackend(threads: 1, isa: .portable).name == "cpu (portable, 1 thread)")
    #expect(levels.first == .portable && levels.last == .best)
    for level in InstructionSet.allCases {
      #expect(InstructionSet(name: level.name) == level)
      if !level.isSupported { #expect(throws: EngineError.self) { try CPUBackend(threads: 1, isa: level) } }
    }
    #expect(InstructionSet(name: "sse9") == nil)
    #expect(try CPUBackend().threads >= 1)
  }

  @Test func allocatedMemoryIsZeroedAndAligned() throws {
    let backend = try makeBackend(.portable)
    for rows in [0, 1, 700] {
      let x = try backend.allocate(rows: rows, columns: 1001, dtype: .float32)
      #expect(Int(bitPattern: x.pointer) % 64 == 0)
      #expect(values(x).allSatisfy { $0 == 0 })
    }
  }
}

final class Counter: Sendable {
  let value = Atomic<Int>(0)
}

@Suite struct LinuxTests {
  @Test func processorsAndMemory() {
    var processors = [Int32](repeating: -1, count: 4096)
    let allowed = Int(apus_processors(&processors, 4096))
    #expect(allowed >= 1 && processors[0] >= 0)
    let all = Set(processors.prefix(allowed))
    let cores = Int(apus_physical_cores(&processors, 4096))
    #expect(cores >= 1 && cores <= allowed)
    #expect(all.isSuperset(of: processors.prefix(cores)))
    #expect(Int(apus_usable_core_count()) >= 1 && Int(apus_usable_core_count()) <= cores)
    #expect(apus_physical_cores(nil, 0) == Int32(cores))
    #expect(apus_memory_total() > 1 << 20)
    #expect(apus_memory_available() <= apus_memory_total())
    #expect(apus_memory_resident() > 0 && apus_memory_resident_peak() >= apus_memory_resident() / 2)
  }

  @Test func mappedMemory() throws {
    for size in [1, 4096, 1 << 21, (5 << 20) + 3] {
      let address = try #require(apus_memory_map(size))
      let bytes = address.assumingMemoryBound(to: UInt8.self)
      #expect(bytes[0] == 0 && bytes[size - 1] == 0)
      bytes[size - 1] = 1
      if size >= 1 << 21 { #expect(Int(bitPattern: address) % (1 << 21) == 0) }
      apus_memory_unmap(address, size)
    }
    #expect(apus_memory_map(0) == nil)
    #expect(apus_memory_map(.max) == nil)
    let file = apus_memory_file_create("apus-test", 10_000)
    #expect(file >= 0)
    #expect(lseek(file, 0, SEEK_END) == 10_000)
    close(file)
  }

  @Test func clockAndFutex() {
    let begin = apus_monotonic_ns()
    var word: UInt32 = 5
    #expect(apus_futex_wait(&word, 4, -1) == 1)
    #expect(apus_futex_wait(&word, 5, 1000) == 0)
    #expect(apus_futex_wake(&word, 1) == 0)
    #expect(apus_monotonic_ns() >= begin + 1000)
  }

  @Test func aRingIsNeverLost() throws {
    let bell = try #require(apus_doorbell_create())
    #expect(apus_doorbell_wait(bell, 0) == 0)
    apus_doorbell_ring(bell)
    apus_doorbell_ring(bell)
    #expect(apus_doorbell_wait(bell, -1) == 1)
    #expect(apus_doorbell_wait(bell, 1000) == 0)
    // A thread counts tickets up and rings after each; the waiter must see the last one without ever hanging.
    let box = BellBox(bell)
    var thread = pthread_t()
    let argument = Unmanaged.passRetained(box).toOpaque()
    let created = pthread_create(
      &thread, nil,
      { argument in
        let box = Unmanaged<BellBox>.fromOpaque(argument!).takeRetainedValue()
        for _ in 0..<20_000 {
          box.tickets.add(1, ordering: .releasing)
          apus_doorbell_ring(box.bell)
        }
        return nil
      }, argument)
    #expect(created == 0)
    while box.tickets.load(ordering: .acquiring) < 20_000 { _ = apus_doorbell_wait(bell, -1) }
    pthread_join(thread, nil)
    #expect(box.tickets.load(ordering: .acquiring) == 20_000)
    apus_doorbell_free(bell)
  }

  @Test func threadsCanBeNamedAndPinned() throws {
    var thread = pthread_t()
    let created = pthread_create(
      &thread, nil,
      { _ in
        apus_thread_set_name("a name longer than fifteen bytes")
        var name = [CChar](repeating: 0, count: 64)
        let file = open("/proc/thread-self/comm", O_RDONLY)
        read(file, &name, 63)
        close(file)
        var processors = [Int32](repeating: 0, count: 4096)
        let count = apus_processors(&processors, 4096)
        let last = processors[Int(count) - 1]
        let pinned = apus_thread_pin(last)
        var now = [Int32](repeating: 0, count: 4)
        let allowed = apus_processors(&now, 4)
        let isRight =
          strcmp(name, "a name longer t\n") == 0 && pinned == 0 && allowed == 1 && now[0] == last
          && apus_thread_pin(-1) == -1 && apus_thread_pin(1 << 20) == -1
        return UnsafeMutableRawPointer(bitPattern: isRight ? 1 : 2)
      }, nil)
    #expect(created == 0)
    var result: UnsafeMutableRawPointer?
    pthread_join(thread, &result)
    #expect(Int(bitPattern: result) == 1)
  }
}

final class BellBox: @unchecked Sendable {
  let bell: OpaquePointer
  let tickets = Atomic<Int>(0)

  init(_ bell: OpaquePointer) { self.bell = bell }
}
