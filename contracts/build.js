// Compiles the contracts with the pinned solc and writes one artifact per contract for the Python package.
// `--check` writes nothing and fails if a committed artifact differs.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const path = require("path");
const solc = require("solc");

const ROOT = __dirname;
const TARGET = path.join(ROOT, "..", "smartnodes_core", "chain", "artifacts");
const CONTRACTS = ["SNO", "Registry", "Escrow", "Rounds"];

// Rounds are executed for ever and deployed once, and the code stays under the limit; `none` keeps absolute paths and metadata out of the bytecode.
const SETTINGS = {
  evmVersion: "cancun",
  optimizer: { enabled: true, runs: 1000000 },
  viaIR: false,
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"] } },
};

function sourceFiles(folder = "") {
  const names = fs.readdirSync(path.join(ROOT, folder), { withFileTypes: true });
  return names
    .flatMap((entry) => {
      const name = path.posix.join(folder, entry.name);
      if (entry.isDirectory()) return entry.name === "node_modules" ? [] : sourceFiles(name);
      return name.endsWith(".sol") ? [name] : [];
    })
    .sort();
}

// Imports found on the way are added to `input.sources`.
function compile(names, outputSelection = SETTINGS.outputSelection) {
  const sources = Object.fromEntries(
    names.map((name) => [name, { content: fs.readFileSync(path.join(ROOT, name), "utf8") }]),
  );
  const input = { language: "Solidity", sources: { ...sources }, settings: { ...SETTINGS, outputSelection } };
  const imports = (name) => {
    const contents = fs.readFileSync(path.join(ROOT, "node_modules", name), "utf8");
    sources[name] = { content: contents };
    return { contents };
  };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: imports }));
  const problems = output.errors || [];
  for (const problem of problems) process.stderr.write(problem.formattedMessage + "\n");
  if (problems.length > 0) throw new Error(`${problems.length} errors or warnings: all must be mended`);
  return { input: { ...input, sources }, output };
}

function sha256(name) {
  return crypto.createHash("sha256").update(fs.readFileSync(path.join(ROOT, name))).digest("hex");
}

function openzeppelinVersion() {
  return require("@openzeppelin/contracts/package.json").version;
}

function main() {
  const names = sourceFiles();
  const compiled = compile(names).output.contracts;
  const hashes = Object.fromEntries(names.map((name) => [name, sha256(name)]));
  let stale = 0;
  fs.mkdirSync(TARGET, { recursive: true });
  for (const contract of CONTRACTS) {
    const output = compiled[`${contract}.sol`][contract];
    const artifact = {
      contract,
      compiler: solc.version(),
      openzeppelin: openzeppelinVersion(),
      evm: SETTINGS.evmVersion,
      optimizer_runs: SETTINGS.optimizer.runs,
      sources: hashes,
      abi: output.abi,
      bytecode: "0x" + output.evm.bytecode.object,
    };
    const text = JSON.stringify(artifact, null, 1) + "\n";
    const file = path.join(TARGET, `${contract}.json`);
    const kept = fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "";
    const size = output.evm.deployedBytecode.object.length / 2;
    process.stdout.write(`${contract}: ${size} bytes${kept === text ? "" : ", changed"}\n`);
    if (kept === text) continue;
    stale += 1;
    if (!process.argv.includes("--check")) fs.writeFileSync(file, text);
  }
  if (stale > 0 && process.argv.includes("--check")) {
    throw new Error(`${stale} artifacts do not match the sources: run 'npm run build' in contracts/`);
  }
}

if (require.main === module) main();
module.exports = { compile, sourceFiles };
