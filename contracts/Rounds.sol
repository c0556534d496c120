// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {IRounds} from "./interfaces/IRounds.sol";
import {ISNO} from "./interfaces/ISNO.sol";

/// @title Rounds: see IRounds. Holds the rewards that were minted and not yet claimed.
contract Rounds is IRounds, EIP712 {
    using SafeERC20 for ISNO;

    struct Network {
        uint64 round;
        uint64 executedAt;
        uint64 emittedUntil;
        uint16 shareBps;
        bool open;
        bytes32 previousHash;
        uint128 allotted;
        uint128 claimed;
    }

    struct Root {
        uint64 round;
        uint64 setAt;
        bytes32 root;
    }

    /// @notice Roots kept per network. A claim needs one that is older than the claim delay, while rounds go on.
    uint256 public constant KEPT_ROOTS = 64;
    uint256 private constant SIGNATURE_BYTES = 65;
    uint256 private constant ALL_BPS = 10_000;
    /// @dev The content is hashed as one ABI encoding of the whole struct: no field can be forgotten in a type string.
    bytes32 private constant ROUND_TYPEHASH =
        keccak256("Round(uint32 networkId,uint64 round,uint32 viewNumber,bytes32 previousHash,bytes32 content)");

    ISNO public immutable sno;
    IRegistry public immutable registry;
    IEscrow public immutable escrow;
    address public immutable deployer;
    uint256 public immutable roundInterval;
    uint256 public immutable claimDelay;

    bool public isSetUp;
    mapping(uint32 networkId => Network) private _networks;
    mapping(uint32 networkId => mapping(uint256 place => Root)) private _roots;
    /// @inheritdoc IRounds
    mapping(uint32 networkId => mapping(address account => uint256)) public claimedBy;

    constructor(ISNO sno_, IRegistry registry_, IEscrow escrow_, Settings memory settings)
        EIP712("Smartnodes Rounds", "1")
    {
        if (settings.roundInterval == 0) revert BadSettings();
        // Or the last final root would be overwritten before the next one becomes final.
        if (settings.claimDelay > settings.roundInterval * (KEPT_ROOTS / 2)) revert BadSettings();
        // The other three were told this address before it existed: a mistake must not deploy.
        if (sno_.rounds() != address(this)) revert NotWired(address(sno_));
        sno = sno_;
        registry = registry_;
        escrow = escrow_;
        deployer = msg.sender;
        roundInterval = settings.roundInterval;
        claimDelay = settings.claimDelay;
    }

    /// @inheritdoc IRounds
    function setup(NetworkShare[] calldata networks) external {
        if (msg.sender != deployer) revert OnlyDeployer(msg.sender);
        if (isSetUp) revert AlreadySetUp();
        isSetUp = true;
        uint256 shares = 0;
        for (uint256 i = 0; i < networks.length; ++i) {
            Network storage network = _networks[networks[i].networkId];
            if (network.open) revert BadSettings();
            network.open = true;
            network.shareBps = networks[i].shareBps;
            network.executedAt = uint64(block.timestamp);
            network.emittedUntil = uint64(block.timestamp);
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
        bytes32 digest = digestOf(proposal);
        address[] memory signers = _checkQuorum(proposal.networkId, digest, signatures);
        _allot(network, proposal);
        network.round = proposal.round;
        network.executedAt = uint64(block.timestamp);
        network.emittedUntil = proposal.until;
        network.previousHash = digest;
        emit RoundExecuted(
            proposal.networkId, proposal.round, proposal.viewNumber, digest, proposal.evidenceRoot, signers
        );
        if (proposal.jobsCreated.length + proposal.jobsCompleted.length != 0) {
            emit JobsUpdated(proposal.networkId, proposal.round, proposal.jobsCreated, proposal.jobsCompleted);
        }
        registry.applyReputations(proposal.networkId, proposal.reputations);
        if (proposal.slashes.length != 0) registry.slash(proposal.networkId, proposal.slashes);
        if (proposal.settlements.length != 0) escrow.settle(proposal.networkId, proposal.settlements);
        registry.startEpoch(proposal.networkId);
    }

    /// @inheritdoc IRounds
    function claim(uint32 networkId, uint64 round, address account, uint256 total, bytes32[] calldata proof)
        external
        returns (uint256 amount)
    {
        Root storage root = _roots[networkId][round % KEPT_ROOTS];
        if (root.round != round || root.root == bytes32(0)) revert NoRoot(round);
        uint256 until = root.setAt + claimDelay;
        if (block.timestamp < until) revert ClaimTooEarly(until);
        bytes32 leaf = keccak256(
            bytes.concat(keccak256(abi.encode(block.chainid, address(this), networkId, account, total)))
        );
        if (!MerkleProof.verifyCalldata(proof, root.root, leaf)) revert BadProof();
        uint256 before = claimedBy[networkId][account];
        if (total <= before) return 0;
        amount = total - before;
        claimedBy[networkId][account] = total;
        // One network's quorum cannot reach what was allotted to another.
        Network storage network = _networks[networkId];
        if (amount > network.allotted - network.claimed) {
            revert AllotmentTooLarge(amount, network.allotted - network.claimed);
        }
        network.claimed += uint128(amount);
        emit Claimed(networkId, account, amount, total);
        sno.safeTransfer(account, amount);
    }

    // -- views ---------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRounds
    function digestOf(Proposal calldata proposal) public view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    ROUND_TYPEHASH,
                    proposal.networkId,
                    proposal.round,
                    proposal.viewNumber,
                    proposal.previousHash,
                    keccak256(abi.encode(proposal))
                )
            )
        );
    }

    /// @inheritdoc IRounds
    function emission(uint32 networkId, uint64 until) public view returns (uint256) {
        Network storage network = _networks[networkId];
        uint256 from = network.emittedUntil;
        // Silence is no backlog to grab: what is older than two intervals lapses.
        if (until > from + 2 * roundInterval) from = until - 2 * roundInterval;
        if (until <= from) return 0;
        return ((sno.mintable(until) - sno.mintable(from)) * network.shareBps) / ALL_BPS;
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
        result.allotted = network.allotted;
        result.claimed = network.claimed;
        for (uint256 i = 0; i < KEPT_ROOTS; ++i) {
            Root storage root = _roots[networkId][i];
            if (root.root == bytes32(0)) continue;
            if (root.round > result.latestRootRound) {
                (result.latestRootRound, result.latestRoot) = (root.round, root.root);
            }
            if (root.round > result.finalRootRound && block.timestamp >= root.setAt + claimDelay) {
                (result.finalRootRound, result.finalRoot) = (root.round, root.root);
            }
        }
    }

    /// @inheritdoc IRounds
    function quorum(uint256 live) public pure returns (uint256) {
        return (2 * live) / 3 + 1;
    }

    // -- inside --------------------------------------------------------------------------------------------------------

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

    /// Ascending order makes the signers distinct; the registry says which of them count.
    function _checkQuorum(uint32 networkId, bytes32 digest, bytes calldata signatures)
        private
        view
        returns (address[] memory signers)
    {
        uint256 length = signatures.length / SIGNATURE_BYTES;
        if (signatures.length != length * SIGNATURE_BYTES) revert BadSignature(length);
        signers = new address[](length);
        address last = address(0);
        for (uint256 i = 0; i < length; ++i) {
            uint256 start = i * SIGNATURE_BYTES;
            (address signer, ECDSA.RecoverError problem,) = ECDSA.tryRecover(
                digest,
                uint8(signatures[start + 64]),
                bytes32(signatures[start:start + 32]),
                bytes32(signatures[start + 32:start + 64])
            );
            if (problem != ECDSA.RecoverError.NoError) revert BadSignature(i);
            if (signer <= last) revert SignersNotAscending(i);
            signers[i] = last = signer;
        }
        uint256 counted;
        uint256 total;
        (counted, signers, total) = registry.liveAmong(networkId, signers);
        if (counted < quorum(total)) revert QuorumMissing(counted, quorum(total));
        assembly ("memory-safe") {
            mstore(signers, counted) // drop the places behind the live ones
        }
    }

    function _allot(Network storage network, Proposal calldata proposal) private {
        uint256 amount = proposal.allotment;
        if (amount != 0) {
            if (proposal.rewardsRoot == bytes32(0)) revert AllotmentWithoutRoot();
            uint256 allowed = emission(proposal.networkId, proposal.until);
            if (amount > allowed) revert AllotmentTooLarge(amount, allowed);
            network.allotted += uint128(amount);
            sno.mint(address(this), amount);
        }
        if (proposal.rewardsRoot == bytes32(0)) return;
        _roots[proposal.networkId][proposal.round % KEPT_ROOTS] =
            Root({round: proposal.round, setAt: uint64(block.timestamp), root: proposal.rewardsRoot});
        emit Generated(proposal.networkId, proposal.round, amount, proposal.rewardsRoot);
    }
}
