// swift-tools-version: 6.1
import PackageDescription

// One list of settings for every Swift target, so that no target is written in another dialect.
let settings: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .enableUpcomingFeature("InternalImportsByDefault"),
]

// Tests that do not reckon are compiled without optimisation: optimising code that runs once took minutes of a cold
// build. What computes (kernels, models, scheduling in the simulator, tokenization) keeps it, for its slow twins' sake.
let testSettings = settings + [.unsafeFlags(["-Onone"])]

let package = Package(
  name: "apus",
  products: [
    .library(name: "Apus", targets: ["Apus"]),
    .library(name: "ApusTesting", targets: ["ApusTesting"]),
    .executable(name: "apus", targets: ["apus-cli"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.5.0"),
    .package(url: "https://github.com/apple/swift-log", from: "1.6.0"),
    .package(url: "https://github.com/apple/swift-metrics", from: "2.5.0"),
    .package(url: "https://github.com/apple/swift-nio", from: "2.80.0"),
    .package(url: "https://github.com/apple/swift-nio-ssl", from: "2.30.0"),
    .package(url: "https://github.com/hummingbird-project/hummingbird", from: "2.20.0", traits: []),
    .package(url: "https://github.com/groue/GRDB.swift", from: "7.10.0"),
    .package(url: "https://github.com/swift-server/async-http-client", from: "1.26.0"),
    .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.6.0"),
  ],
  targets: [
    // C: inner loops and what Swift cannot call.
    .target(name: "CKernels"),
    .target(name: "CLinux"),
    .target(name: "CHash"),

    // The engine, bottom up.
    .target(name: "ApusCore", swiftSettings: settings),
    .target(name: "ApusTokenization", dependencies: ["ApusCore"], swiftSettings: settings),
    .target(name: "ApusGrammar", dependencies: ["ApusCore"], swiftSettings: settings),
    .target(name: "ApusChat", dependencies: ["ApusCore"], swiftSettings: settings),
    .target(name: "ApusScheduling", dependencies: ["ApusCore"], swiftSettings: settings),
    .target(name: "ApusTensors", dependencies: ["ApusCore", "CKernels", "CLinux"], swiftSettings: settings),
    .target(name: "ApusCommunication", dependencies: ["ApusCore", "ApusTensors"], swiftSettings: settings),
    .target(
      name: "ApusModels", dependencies: ["ApusCore", "ApusTensors", "ApusCommunication"],
      swiftSettings: settings),
    .target(
      name: "ApusExecution", dependencies: ["ApusCore", "ApusScheduling", "ApusTensors", "ApusModels", "CLinux"],
      swiftSettings: settings),
    .target(
      name: "ApusEngine",
      dependencies: [
        "ApusCore", "ApusTokenization", "ApusGrammar", "ApusScheduling", "ApusTensors", "ApusModels", "ApusExecution",
        "CLinux",
        .product(name: "Logging", package: "swift-log"),
      ], swiftSettings: settings),

    .target(
      name: "ApusConversion", dependencies: ["ApusCore", "ApusTokenization", "ApusTensors", "ApusModels"],
      swiftSettings: settings),

    // The edges, which meet the engine only through GenerationService.
    .target(
      name: "ApusServer",
      dependencies: [
        "ApusCore", "ApusChat",
        .product(name: "Hummingbird", package: "hummingbird"),
        .product(name: "HummingbirdTLS", package: "hummingbird"),
        .product(name: "Logging", package: "swift-log"),
        .product(name: "Metrics", package: "swift-metrics"),
        .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOSSL", package: "swift-nio-ssl"),
        .product(name: "ServiceLifecycle", package: "swift-service-lifecycle"),
      ], swiftSettings: settings),

    // What the server's stateful endpoints keep; the only importer of GRDB.
    .target(
      name: "ApusStore",
      dependencies: ["ApusCore", "ApusServer", .product(name: "GRDB", package: "GRDB.swift")],
      swiftSettings: settings),

    // Model hubs and their cache: knows neither engine nor server.
    .target(
      name: "ApusHub",
      dependencies: [
        "ApusCore", "CHash",
        .product(name: "AsyncHTTPClient", package: "async-http-client"),
        .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOHTTP1", package: "swift-nio"),
      ], swiftSettings: settings),

    .target(name: "Apus", dependencies: ["ApusCore", "ApusEngine"], swiftSettings: settings),
    .target(
      name: "ApusTesting", dependencies: ["ApusCore", "ApusScheduling"], swiftSettings: settings),
    .target(
      name: "ApusCommandLine",
      dependencies: [
        "ApusCore", "ApusTokenization", "ApusGrammar", "ApusEngine", "ApusExecution", "ApusScheduling", "ApusServer",
        "ApusTensors", "ApusModels", "ApusHub", "ApusConversion", "ApusTesting", "ApusChat", "ApusStore", "CLinux",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "AsyncHTTPClient", package: "async-http-client"),
        .product(name: "Logging", package: "swift-log"),
        .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOHTTP1", package: "swift-nio"),
      ], swiftSettings: settings),
    .executableTarget(
      name: "apus-cli", dependencies: ["ApusCommandLine"], path: "Sources/apus", swiftSettings: settings),

    .testTarget(name: "ApusCoreTests", dependencies: ["ApusCore"], swiftSettings: testSettings),
    .testTarget(
      name: "ApusTokenizationTests", dependencies: ["ApusCore", "ApusTesting", "ApusTokenization"],
      swiftSettings: settings),
    .testTarget(
      name: "ApusGrammarTests", dependencies: ["ApusCore", "ApusGrammar", "ApusTokenization"], exclude: ["Goldens"],
      swiftSettings: testSettings),
    .testTarget(
      name: "ApusChatTests", dependencies: ["ApusCore", "ApusChat", "ApusGrammar", "ApusTokenization"],
      swiftSettings: testSettings),
    .testTarget(
      name: "ApusSchedulingTests", dependencies: ["ApusCore", "ApusScheduling", "ApusTesting"],
      swiftSettings: settings),
    .testTarget(
      name: "ApusTensorsTests", dependencies: ["ApusCore", "ApusTensors", "CKernels", "CLinux"],
      swiftSettings: settings),
    .testTarget(
      name: "ApusExecutionTests",
      dependencies: ["ApusCore", "ApusScheduling", "ApusTensors", "ApusModels", "ApusExecution", "ApusTesting"],
      exclude: ["Goldens"], swiftSettings: settings),
    .testTarget(
      name: "ApusConversionTests",
      dependencies: [
        "ApusConversion", "ApusCore", "ApusTokenization", "ApusScheduling", "ApusTensors", "ApusModels",
        "ApusExecution",
      ], exclude: ["Goldens"], swiftSettings: testSettings),
    .testTarget(
      name: "ApusEngineTests",
      dependencies: [
        "Apus", "ApusCore", "ApusEngine", "ApusExecution", "ApusModels", "ApusScheduling", "ApusTensors",
        "ApusTesting", "ApusTokenization",
      ],
      swiftSettings: testSettings),
    .testTarget(
      name: "ApusServerTests",
      dependencies: [
        "ApusCore", "ApusServer", "ApusEngine", "ApusStore", "ApusTesting",
        .product(name: "HummingbirdTesting", package: "hummingbird"),
        .product(name: "AsyncHTTPClient", package: "async-http-client"),
        .product(name: "NIOHTTP1", package: "swift-nio"),
      ], exclude: ["Goldens"], swiftSettings: testSettings),
    .testTarget(name: "ApusHubTests", dependencies: ["ApusCore", "ApusHub", "CHash"], swiftSettings: testSettings),
    .testTarget(
      name: "ApusCommandLineTests", dependencies: ["ApusCore", "ApusCommandLine", "ApusEngine", "ApusTesting"],
      swiftSettings: testSettings),
  ]
)
