// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Payment of jobs in SNO: deposited by the user, settled by rounds as work is verified, each wei ending once.
/// @notice For every escrow: paid + fee + refunded + remaining = deposited.
interface IEscrow {
    struct Payment {
        address to;
        uint256 amount;
    }

    /// @notice One job's share of a round: payments and fee leave the escrow, `refund` goes back to the payer.
    struct Settlement {
        bytes32 escrowId;
        uint256 fee;
        uint256 refund;
        Payment[] payments;
    }

    struct Account {
        address payer;
        uint32 networkId;
        uint64 deadline;
        uint256 deposited;
        uint256 remaining;
    }

    event Deposited(
        uint32 indexed networkId, bytes32 indexed escrowId, address indexed payer, bytes32 jobId, uint256 amount
    );
    event Settled(bytes32 indexed escrowId, uint256 paid, uint256 fee, uint256 refunded);
    /// @notice The escrow no longer held what the round wanted from it; nothing was moved.
    event SettlementSkipped(bytes32 indexed escrowId, uint256 wanted, uint256 remaining);
    event Refunded(bytes32 indexed escrowId, uint256 amount);
    event Credited(address indexed account, uint256 amount);
    event Withdrawn(address indexed account, uint256 amount);

    error OnlyRounds(address caller);
    error NothingDeposited();
    error DeadlineTooEarly(uint256 deadline, uint256 earliest);
    error NotYetRefundable(uint256 until);
    error UnknownEscrow(bytes32 escrowId);
    error NothingToWithdraw(address account);

    /// @notice The escrow of `payer`'s job: the payer is part of it, so that nobody can take another's job id first.
    function escrowIdOf(uint32 networkId, address payer, bytes32 jobId) external pure returns (bytes32);

    /// @notice Adds `amount` wei to the caller's job (approve first) and moves its deadline, only ever later.
    function deposit(uint32 networkId, bytes32 jobId, uint256 amount, uint64 deadline)
        external
        returns (bytes32 escrowId);

    /// @notice Only by Rounds. A settlement its escrow cannot cover is skipped with an event, never blocks the round.
    function settle(uint32 networkId, Settlement[] calldata settlements) external;

    /// @notice Credits what remains to the payer, once the deadline and the dispute window are over. Callable by anyone.
    function refund(bytes32 escrowId) external;

    /// @notice Pays out what `account` was credited. Callable by anyone, paid to the owner.
    function withdraw(address account) external;

    function accounts(bytes32 escrowId)
        external
        view
        returns (address payer, uint32 networkId, uint64 deadline, uint256 deposited, uint256 remaining);

    /// @notice Wei that `account` can withdraw.
    function credits(address account) external view returns (uint256);
}
