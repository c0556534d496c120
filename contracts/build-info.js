// Writes sources and compiler output as hardhat keeps them, for analysers that need a native compiler otherwise:
// `node build-info.js FOLDER`. See docs/slither.md.
"use strict";

const fs = require("fs");
const path = require("path");
const solc = require("solc");
const { compile, sourceFiles } = require("./build.js");

const target = process.argv[2];
const outputs = ["abi", "evm.bytecode", "evm.deployedBytecode", "evm.methodIdentifiers", "metadata", "devdoc", "userdoc"];
const { input, output } = compile(sourceFiles(), { "*": { "*": outputs, "": ["ast"] } });
for (const [name, { content }] of Object.entries(input.sources)) {
  fs.mkdirSync(path.dirname(path.join(target, name)), { recursive: true });
  fs.writeFileSync(path.join(target, name), content);
}
const info = { id: "all", _format: "hh-sol-build-info-1", solcVersion: solc.version().split("+")[0], input, output };
fs.mkdirSync(path.join(target, "artifacts", "build-info"), { recursive: true });
fs.writeFileSync(path.join(target, "artifacts", "build-info", "all.json"), JSON.stringify(info));
fs.writeFileSync(path.join(target, "hardhat.config.js"), "module.exports = {};\n");
