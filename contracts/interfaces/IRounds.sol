// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IEscrow} from "./IEscrow.sol";
import {IRegistry} from "./IRegistry.sol";

/// @title The validators' multisig: one transaction a round, carried by signatures of more than two thirds of the epoch.
interface IRounds {
    /// @notice What a quorum says of a frozen root. Uphold: it stands, and the freezer's bond is burned. Correct: it and all
    /// later ones are void with their allotments, which the round may allot anew, and the bond goes back.
    enum Ruling {
        None,
        Uphold,
        Correct
    }

    /// @param feeBps part of what a job pays in SNO that is burned, in 1/10,000
    /// @param kappaBps workers share at most the fees burned in their round times this over 10,000; at 10,000 a user who is
    /// also the worker cannot gain; the largest value leaves them the whole emission, which then is a subsidy
    struct Parameters {
        uint16 feeBps;
        uint32 kappaBps;
    }

    /// @notice What a signature is for: whoever signs two contents for one place is slashed.
    struct Place {
        uint32 networkId;
        uint64 round;
        uint32 viewNumber;
        bytes32 previousHash;
    }

    /// @notice Everything a round executes. The signed hash covers every field.
    /// @param viewNumber attempts at this round before this one: a new view may carry another proposal
    /// @param previousHash digest of the proposal executed in the round before, zero for the first
    /// @param until emission is accounted up to this time, in seconds
    /// @param reputations packed updates, see ReputationUpdates.sol
    /// @param rewardsRoot cumulative Merkle root of all rewards so far; zero leaves the last one in force
    /// @param allotment wei minted for this round's rewards
    /// @param admissions members whose node keys were verified, and classes of workers that have changed
    /// @param ruling on the root frozen from `ruledRound` on
    /// @param parameters at most one; in force from the next round on
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
        bytes32[] jobsDisputed;
        IRegistry.Admission[] admissions;
        IRegistry.Slash[] slashes;
        IEscrow.Settlement[] settlements;
        Ruling ruling;
        uint64 ruledRound;
        Parameters[] parameters;
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
        uint128 freezeBond;
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
        uint256 unclaimed;
        uint64 frozenFrom;
    }

    event NetworkOpened(uint32 indexed networkId, uint16 shareBps);
    /// @notice `signers` are those whose signatures counted, 20 bytes each: they share this round's part in the next.
    event RoundExecuted(
        uint32 indexed networkId,
        uint64 indexed round,
        uint32 viewNumber,
        bytes32 digest,
        bytes32 evidenceRoot,
        bytes signers
    );
    /// @notice Signatures that came after the round was executed: their signers share like those that carried it.
    event RoundEndorsed(uint32 indexed networkId, uint64 indexed round, bytes signers);
    /// @notice Of every state update: what it allots, and under which root (zero: the last one stays).
    event Generated(uint32 indexed networkId, uint64 indexed round, uint256 allotment, bytes32 rewardsRoot);
    event JobsUpdated(uint32 indexed networkId, uint64 indexed round, bytes32[] created, bytes32[] completed, bytes32[] disputed);
    event Claimed(uint32 indexed networkId, address indexed account, uint256 amount);

    event Frozen(uint32 indexed networkId, uint64 indexed round, address indexed freezer, uint256 bond);
    event Ruled(uint32 indexed networkId, uint64 indexed round, Ruling ruling, address freezer);
    event ParametersChanged(uint32 indexed networkId, Parameters parameters);

    error OnlyDeployer(address caller);
    error AlreadySetUp();
    error BadSettings();
    error NotWired(address contract_);
    error UnknownNetwork(uint32 networkId);
    error WrongRound(uint64 found, uint64 expected);
    error WrongPrevious(bytes32 found, bytes32 expected);
    error TooEarly(uint256 time, uint256 earliest);
    error BadEmissionTime(uint64 until);
    error QuorumMissing(uint256 counted, uint256 needed);
    error AllotmentTooLarge(uint256 allotment, uint256 emission);
    error AllotmentWithoutRoot();
    error EndorsementTooLate(uint256 until);
    error NoEquivocation();
    error OnlyValidators(address caller);
    error RootFrozen(uint256 fromRound);
    error RootIsFinal(uint64 round);
    error NoRoot(uint64 round);
    error ClaimTooEarly(uint256 until);
    error BadProof();

    /// @notice Opens the networks, all with the same parameters. Once, and only by the deployer.
    function setup(NetworkShare[] calldata networks, Parameters calldata parameters) external;

    /// @notice Executes one round. The proposal's encoding must be the standard one, with the signatures' behind it. `signatures` are 65 bytes each (r, s, v), in ascending order of signer; those of
    /// accounts outside the epoch are not counted. Callable by anyone.
    function execute(Proposal calldata proposal, bytes calldata signatures) external;

    /// @notice Adds signatures of the last round to those that carried it, until the next one is due: sending the
    /// transaction, or leaving somebody's signature out of it, gains nothing. Callable by anyone.
    function endorse(uint32 networkId, bytes calldata signatures) external;

    /// @notice Two signatures of one validator over two contents for one place: it leaves the epoch at once. Callable by
    /// anyone.
    function proveEquivocation(Place calldata place, bytes32[2] calldata contents, bytes calldata signatures) external;

    /// @notice A live validator stops the root of `round`, and all later ones, during the claim delay, for `freezeBond` wei
    /// of SNO (approve them first), until a round rules on it.
    function freeze(uint32 networkId, uint64 round) external;

    /// @notice Pays `account` what `total` exceeds its earlier claims by, under the root of `round`; returns the amount,
    /// zero if there is nothing left. Callable by anyone, paid to the owner.
    function claim(uint32 networkId, uint64 round, address account, uint256 total, bytes32[] calldata proof)
        external
        returns (uint256 amount);

    /// @notice The EIP-712 hash that validators sign.
    function digestOf(Proposal calldata proposal) external view returns (bytes32);

    /// @notice The most a round may allot if it accounts emission up to `until`.
    function emission(uint32 networkId, uint64 until) external view returns (uint256);

    /// @notice When the last round was executed, or the network opened; 0 where there is none.
    function executedAt(uint32 networkId) external view returns (uint256);

    /// @notice The parameters of the next round.
    function parametersOf(uint32 networkId) external view returns (Parameters memory);

    function state(uint32 networkId) external view returns (State memory);

    /// @notice Wei that `account` has claimed so far.
    function claimedBy(uint32 networkId, address account) external view returns (uint256);

    /// @notice Signatures needed among `live` validators: more than two thirds.
    function quorum(uint256 live) external pure returns (uint256);
}
