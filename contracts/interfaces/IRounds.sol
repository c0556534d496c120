// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IEscrow} from "./IEscrow.sol";
import {IRegistry} from "./IRegistry.sol";

/// @title The validators' multisig: one transaction a round, carried by signatures of more than two thirds of the epoch.
interface IRounds {
    /// @notice Everything a round executes. The signed hash covers every field.
    /// @param viewNumber attempts at this round before this one: a new view may carry another proposal
    /// @param previousHash digest of the proposal executed in the round before, zero for the first
    /// @param until emission is accounted up to this time, in seconds
    /// @param reputations packed updates, see ReputationUpdates.sol
    /// @param rewardsRoot cumulative Merkle root of all rewards so far; zero leaves the last one in force
    /// @param allotment wei minted for this round's rewards
    struct Proposal {
        uint32 networkId;
        uint64 round;
        uint32 viewNumber;
        bytes32 previousHash;
        uint64 until;
        bytes reputations;
        bytes32 rewardsRoot;
        uint256 allotment;
        bytes32[] jobsCreated;
        bytes32[] jobsCompleted;
        IRegistry.Slash[] slashes;
        IEscrow.Settlement[] settlements;
        bytes32 evidenceRoot;
    }

    /// @notice A network opened at set-up and its share of the emission, in 1/10,000.
    struct NetworkShare {
        uint32 networkId;
        uint16 shareBps;
    }

    struct Settings {
        uint64 roundInterval;
        uint64 claimDelay;
    }

    /// @notice What a node polls: one call tells whether a round is due and under which root rewards can be claimed.
    struct State {
        uint64 round;
        bytes32 previousHash;
        uint64 executedAt;
        uint64 earliestAt;
        uint64 interval;
        uint64 emittedUntil;
        uint64 chainTime;
        uint64 claimDelay;
        uint64 latestRootRound;
        bytes32 latestRoot;
        uint64 finalRootRound;
        bytes32 finalRoot;
        uint128 allotted;
        uint128 claimed;
    }

    event NetworkOpened(uint32 indexed networkId, uint16 shareBps);
    /// @notice `signers` are those whose signatures counted: they share this round's part in the next.
    event RoundExecuted(
        uint32 indexed networkId,
        uint64 indexed round,
        uint32 viewNumber,
        bytes32 digest,
        bytes32 evidenceRoot,
        address[] signers
    );
    event Generated(uint32 indexed networkId, uint64 indexed round, uint256 allotment, bytes32 rewardsRoot);
    event JobsUpdated(uint32 indexed networkId, uint64 indexed round, bytes32[] created, bytes32[] completed);
    event Claimed(uint32 indexed networkId, address indexed account, uint256 amount, uint256 total);

    error OnlyDeployer(address caller);
    error AlreadySetUp();
    error BadSettings();
    error NotWired(address contract_);
    error UnknownNetwork(uint32 networkId);
    error WrongRound(uint64 found, uint64 expected);
    error WrongPrevious(bytes32 found, bytes32 expected);
    error TooEarly(uint256 time, uint256 earliest);
    error BadEmissionTime(uint64 until);
    error BadSignature(uint256 position);
    error SignersNotAscending(uint256 position);
    error QuorumMissing(uint256 counted, uint256 needed);
    error AllotmentTooLarge(uint256 allotment, uint256 emission);
    error AllotmentWithoutRoot();
    error NoRoot(uint64 round);
    error ClaimTooEarly(uint256 until);
    error BadProof();

    /// @notice Opens the networks. Once, and only by the deployer.
    function setup(NetworkShare[] calldata networks) external;

    /// @notice Executes one round. `signatures` are 65 bytes each (r, s, v), in ascending order of signer; those of
    /// accounts outside the epoch are not counted. Callable by anyone.
    function execute(Proposal calldata proposal, bytes calldata signatures) external;

    /// @notice Pays `account` what `total` exceeds its earlier claims by, under the root of `round`; returns the amount,
    /// zero if there is nothing left. Callable by anyone, paid to the owner.
    function claim(uint32 networkId, uint64 round, address account, uint256 total, bytes32[] calldata proof)
        external
        returns (uint256 amount);

    /// @notice The EIP-712 hash that validators sign.
    function digestOf(Proposal calldata proposal) external view returns (bytes32);

    /// @notice The most a round may allot if it accounts emission up to `until`.
    function emission(uint32 networkId, uint64 until) external view returns (uint256);

    function state(uint32 networkId) external view returns (State memory);

    /// @notice Wei that `account` has claimed so far.
    function claimedBy(uint32 networkId, address account) external view returns (uint256);

    /// @notice Signatures needed among `live` validators: more than two thirds.
    function quorum(uint256 live) external pure returns (uint256);
}
