// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {IRounds} from "./interfaces/IRounds.sol";
import {ISNO} from "./interfaces/ISNO.sol";
import {Quorum} from "./libraries/Quorum.sol";
import {Rewards} from "./Rewards.sol";

/// @title Rounds: see IRounds. The only account that mints, settles, slashes and admits, and it does what a quorum signed.
contract Rounds is Rewards, EIP712 {
    /// @dev The content is hashed as one ABI encoding of the whole struct: no field can be forgotten in a type string, and
    /// two contents of one place are proven by their hashes alone.
    bytes32 private constant ROUND_TYPEHASH =
        keccak256("Round(uint32 networkId,uint64 round,uint32 viewNumber,bytes32 previousHash,bytes32 content)");

    IEscrow public immutable escrow;
    address public immutable deployer;
    bool public isSetUp;

    constructor(ISNO sno_, IRegistry registry_, IEscrow escrow_, Settings memory settings)
        EIP712("Smartnodes Rounds", "1")
        Rewards(sno_, registry_, settings)
    {
        // The other three were told this address before it existed: a mistake must not deploy.
        if (sno_.rounds() != address(this)) revert NotWired(address(sno_));
        if (registry_.rounds() != address(this)) revert NotWired(address(registry_));
        if (escrow_.rounds() != address(this)) revert NotWired(address(escrow_));
        // A stake must outlast every dispute about what its owner did.
        if (registry_.exitDelay() <= escrow_.disputeWindow() + settings.claimDelay) revert BadSettings();
        escrow = escrow_;
        deployer = msg.sender;
    }

    /// @inheritdoc IRounds
    function setup(NetworkShare[] calldata networks, Parameters calldata parameters) external {
        if (msg.sender != deployer) revert OnlyDeployer(msg.sender);
        if (isSetUp) revert AlreadySetUp();
        isSetUp = true;
        _checkParameters(parameters);
        uint256 shares = 0;
        for (uint256 i = 0; i < networks.length; ++i) {
            Network storage network = _networks[networks[i].networkId];
            if (network.open) revert BadSettings();
            network.open = true;
            network.shareBps = networks[i].shareBps;
            network.executedAt = uint40(block.timestamp);
            network.emittedUntil = uint40(block.timestamp);
            network.parameters = parameters;
            shares += networks[i].shareBps;
            emit NetworkOpened(networks[i].networkId, networks[i].shareBps);
            registry.openNetwork(networks[i].networkId);
        }
        if (shares > ALL_BPS) revert BadSettings();
    }

    /// @inheritdoc IRounds
    function execute(Proposal calldata proposal, bytes calldata signatures) external {
        Network storage network = _networks[proposal.networkId];
        _checkTurn(network, proposal);
        bytes32 digest = _digestOf(proposal, _start(signatures));
        bytes memory signers = _checkQuorum(proposal.networkId, digest, signatures);
        if (network.changing) _changeParameters(proposal.networkId, network);
        uint256 released = _rule(network, proposal);
        uint256 fees = 0;
        if (proposal.settlements.length != 0) {
            fees = escrow.settle(proposal.networkId, proposal.settlements, network.parameters.feeBps);
        }
        _allot(network, proposal, fees, released);
        _advance(network, proposal, digest);
        registry.applyRound(proposal.networkId, proposal.reputations, proposal.admissions, proposal.slashes);
        _announce(proposal, digest, signers);
    }

    /// @inheritdoc IRounds
    function endorse(uint32 networkId, bytes calldata signatures) external {
        Network storage network = _networks[networkId];
        if (network.round == 0) revert UnknownNetwork(networkId);
        uint256 until = network.executedAt + roundInterval;
        if (block.timestamp >= until) revert EndorsementTooLate(until);
        (bytes memory signers,,) = registry.liveSigners(networkId, network.previousHash, signatures);
        emit RoundEndorsed(networkId, network.round, signers);
    }

    /// @inheritdoc IRounds
    function proveEquivocation(Place calldata place, bytes32[2] calldata contents, bytes calldata signatures) external {
        if (contents[0] == contents[1]) revert NoEquivocation();
        if (Quorum.count(signatures) != 2) revert NoEquivocation();
        address signer = Quorum.recover(_digest(place, contents[0]), signatures, 0);
        if (signer != Quorum.recover(_digest(place, contents[1]), signatures, 1)) revert NoEquivocation();
        registry.convict(place.networkId, signer);
    }

    // -- views ---------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRounds
    function digestOf(Proposal calldata proposal) external view returns (bytes32) {
        return _digestOf(proposal, msg.data.length);
    }

    /// @inheritdoc IRounds
    function executedAt(uint32 networkId) external view returns (uint256) {
        return _networks[networkId].executedAt;
    }

    /// @inheritdoc IRounds
    function parametersOf(uint32 networkId) external view returns (Parameters memory) {
        Network storage network = _networks[networkId];
        return network.changing ? network.next : network.parameters;
    }

    /// @inheritdoc IRounds
    function state(uint32 networkId) external view returns (State memory result) {
        Network storage network = _networks[networkId];
        if (!network.open) revert UnknownNetwork(networkId);
        result.round = network.round;
        result.previousHash = network.previousHash;
        result.executedAt = network.executedAt;
        result.earliestAt = network.executedAt + uint64(roundInterval);
        result.interval = uint64(roundInterval);
        result.emittedUntil = network.emittedUntil;
        result.chainTime = uint64(block.timestamp);
        result.claimDelay = uint64(claimDelay);
        result.unclaimed = sno.balanceOf(sno.vaultOf(networkId));
        result.frozenFrom = network.frozenFrom;
        for (uint256 i = 0; i < KEPT_ROOTS; ++i) {
            Root storage root = _roots[networkId][i];
            if (root.root == bytes32(0)) continue;
            if (root.round > result.latestRootRound) {
                (result.latestRootRound, result.latestRoot) = (root.round, root.root);
            }
            if (!root.frozen && root.round > result.finalRootRound && block.timestamp >= root.setAt + claimDelay) {
                (result.finalRootRound, result.finalRoot) = (root.round, root.root);
            }
        }
    }

    /// @inheritdoc IRounds
    function quorum(uint256 live) external pure returns (uint256) {
        return Quorum.needed(live);
    }

    // -- inside --------------------------------------------------------------------------------------------------------

    function _digest(Place memory place, bytes32 content) private view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(ROUND_TYPEHASH, place, content)));
    }

    /// The proposal's encoding is hashed as it came, up to `end`: only the one that was signed has its hash.
    function _digestOf(Proposal calldata proposal, uint256 end) private view returns (bytes32) {
        bytes32 content;
        assembly ("memory-safe") {
            let memory_ := mload(0x40)
            mstore(memory_, 0x20) // as abi.encode(proposal) begins
            calldatacopy(add(memory_, 0x20), proposal, sub(end, proposal))
            content := keccak256(memory_, add(sub(end, proposal), 0x20))
        }
        return _digest(
            Place(proposal.networkId, proposal.round, proposal.viewNumber, proposal.previousHash), content
        );
    }

    /// Where the encoding of `data`, its length included, starts.
    function _start(bytes calldata data) private pure returns (uint256 start) {
        assembly ("memory-safe") {
            start := sub(data.offset, 0x20)
        }
    }

    function _checkTurn(Network storage network, Proposal calldata proposal) private view {
        if (!network.open) revert UnknownNetwork(proposal.networkId);
        if (proposal.round != network.round + 1) revert WrongRound(proposal.round, network.round + 1);
        if (proposal.previousHash != network.previousHash) {
            revert WrongPrevious(proposal.previousHash, network.previousHash);
        }
        uint256 earliest = network.executedAt + roundInterval;
        if (block.timestamp < earliest) revert TooEarly(block.timestamp, earliest);
        if (proposal.until > block.timestamp || proposal.until < network.emittedUntil) {
            revert BadEmissionTime(proposal.until);
        }
    }

    function _checkQuorum(uint32 networkId, bytes32 digest, bytes calldata signatures)
        private
        view
        returns (bytes memory signers)
    {
        uint256 found;
        uint256 live;
        (signers, found, live) = registry.liveSigners(networkId, digest, signatures);
        if (found < Quorum.needed(live)) revert QuorumMissing(found, Quorum.needed(live));
    }

    function _advance(Network storage network, Proposal calldata proposal, bytes32 digest) private {
        network.round = uint48(proposal.round);
        network.executedAt = uint40(block.timestamp);
        network.emittedUntil = uint40(proposal.until);
        network.previousHash = digest;
        if (proposal.parameters.length == 0) return;
        _checkParameters(proposal.parameters[0]);
        network.changing = true;
        network.next = proposal.parameters[0];
    }

    function _changeParameters(uint32 networkId, Network storage network) private {
        network.changing = false;
        network.parameters = network.next;
        emit ParametersChanged(networkId, network.next);
    }

    function _checkParameters(Parameters calldata parameters) private pure {
        if (parameters.feeBps > ALL_BPS) revert BadSettings();
    }

    function _announce(Proposal calldata proposal, bytes32 digest, bytes memory signers) private {
        emit RoundExecuted(
            proposal.networkId, proposal.round, proposal.viewNumber, digest, proposal.evidenceRoot, signers
        );
        emit Generated(proposal.networkId, proposal.round, proposal.allotment, proposal.rewardsRoot);
        if (proposal.jobsCreated.length + proposal.jobsCompleted.length + proposal.jobsDisputed.length == 0) return;
        emit JobsUpdated(
            proposal.networkId, proposal.round, proposal.jobsCreated, proposal.jobsCompleted, proposal.jobsDisputed
        );
    }
}
