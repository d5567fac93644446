package main

import (
	"context"
	"fmt"
	"sync"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

const (
	askedAtOnce    = 5_000 // blobs of one FindMissingBlobs
	batchesAtATime = 8
)

// storeMissing stores those blobs that the client will read and the server doesn't have, calmly.
func (c *client) storeMissing(ctx context.Context) error {
	var missing []task
	for n, w := range ways[c.how] {
		if w != viaRead {
			continue
		}
		first, end := c.share(n, len(ways[c.how]))
		for ; first < end; first += askedAtOnce {
			found, err := c.findMissing(ctx, first, min(first+askedAtOnce, end))
			if err != nil {
				return fmt.Errorf("asking for the blobs that will be read: %w", err)
			}
			missing = append(missing, found...)
		}
	}
	return c.storeAll(ctx, missing)
}

// findMissing returns batches that have each missing blob of the range, and maybe some of its neighbours.
func (c *client) findMissing(ctx context.Context, first, end int) ([]task, error) {
	ctx, stop := context.WithTimeout(ctx, c.deadline)
	defer stop()
	request := &repb.FindMissingBlobsRequest{}
	numbers := make(map[string]int, end-first)
	for n := first; n < end; n++ {
		b := c.blob(c.number, n)
		numbers[b.hash] = n
		request.BlobDigests = append(request.BlobDigests, b.digest())
	}
	answer, err := c.cas(0).FindMissingBlobs(ctx, request)
	if err != nil {
		return nil, err
	}
	batches := map[int]bool{}
	var tasks []task
	for _, digest := range answer.MissingBlobDigests {
		start := first + (numbers[digest.Hash]-first)/blobsPerBatch*blobsPerBatch
		if !batches[start] {
			batches[start] = true
			tasks = append(tasks, task{way: viaBatch, first: start, count: min(blobsPerBatch, end-start)})
		}
	}
	return tasks, nil
}

func (c *client) storeAll(ctx context.Context, tasks []task) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	queue := make(chan task)
	var workers sync.WaitGroup
	for n := range batchesAtATime {
		workers.Go(func() {
			for t := range queue {
				if err := c.batchAttempt(t)(ctx, n%c.conns); err != nil {
					stop(fmt.Errorf("storing the blobs that will be read: %w", err))
				}
			}
		})
	}
	for _, t := range tasks {
		queue <- t
	}
	close(queue)
	workers.Wait()
	return context.Cause(ctx)
}
